"""Rows that are filled anew while others go on: what an engine with continuous batching is built on.

    state = empty_rows(ctx, rows=8, max_new_tokens=64)          memory for eight answers to prompts like ctx
    state = insert(state, row, ctx, max_new_tokens=40)          row `row` begins its answer
    state = decode_chunk(model, params, state, steps=16)        all rows go on, by at most so many tokens
    state.tokens[row, : state.step[row]]                        the answer, once state.done[row]; then fill it again

A row's answer depends on its own context, seed and options alone: never on its neighbours, on when it was admitted or
on what the row held before. `insert` and `decode_chunk` are each one program, whatever the row and the options.
"""

import dataclasses
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.geometry import answer_room
from vlcache_jax.cache.state import Allocation, KVState
from vlcache_jax.cache.tail import TailStore
from vlcache_jax.errors import InputError
from vlcache_jax.inference.context import Context, check_count, check_positions
from vlcache_jax.inference.finiteness import is_ready
from vlcache_jax.inference.loop import DecodingState, begun, chunk, with_stores, without_stores
from vlcache_jax.inference.row_options import RowOptions, row_options
from vlcache_jax.inference.sampling import Sampling
from vlcache_jax.parallel.mesh import automatic, on_mesh_of, specs_of
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.placing import placed
from vlcache_jax.parallel.seeds import Seeds
from vlcache_jax.typing import Params, VisionLanguageModel


def empty_rows(ctx: Context, rows: int, max_new_tokens: int) -> DecodingState:
    """A state of free rows, into which `insert` puts contexts like `ctx`.

    Args:
      ctx: whose shapes and rule for generated tokens the rows are for: those of a model, a policy and a prompt bucket.
      rows: how many answers run at the same time.
      max_new_tokens: of the longest answer.

    Returns:
      The state, all of whose rows are done. It holds `rows` times the bytes of one of the context's rows.

    Raises:
      InputError: a number below 1.

    Example:
      state = vlc.empty_rows(ctx, rows=8, max_new_tokens=64)
    """
    check_count("rows", rows)
    check_count("max_new_tokens", max_new_tokens)
    options = placed(row_options(ctx.model.spec, rows, max_new_tokens), ctx.params)
    with on_mesh_of(ctx.params, ctx.stores):
        return free_rows(ctx.model, Prompt.of(ctx), options, rows, answer_room(max_new_tokens))


def insert(
    state: DecodingState,
    row: int,
    ctx: Context,
    max_new_tokens: int,
    *,
    of: int = 0,
    sampling: Sampling | None = None,
    seed: Seeds = 0,
    eos_token_ids: Sequence[int] | None = None,
    log_probabilities: bool = False,
) -> DecodingState:
    """Begins the answer to a context in one row of a running state; what the row held is gone.

    Copies the bytes of one row of the context, in place: the state is donated, so go on with the one returned.

    Args:
      state: from `empty_rows`, `insert` or `decode_chunk`.
      row: which row of the state.
      ctx: of the shapes that the state was made for, or with fewer slots: that of a smaller prompt bucket, unless its
        rule for generated tokens rewrites what was kept.
      max_new_tokens: the answer is cut at this length; at most the state's room.
      of: which of the context's rows.
      sampling: None for greedy decoding.
      seed: an integer or a key, as in `generate`.
      eos_token_ids: ids that end the answer; those of the checkpoint by default. An empty list never stops.
      log_probabilities: write those of the row's tokens into the state.

    Returns:
      The state; the row has its first token.

    Raises:
      InputError: a row that does not exist, a context of other shapes or with another rule for generated tokens than
        the state's, more tokens or stop ids than there is room for, or, where the context has been computed, more
        positions than the model has.

    Example:
      state = vlc.insert(state, 3, ctx, max_new_tokens=40, sampling=vlc.Sampling(temperature=0.7), seed=11)
    """
    check_count("max_new_tokens", max_new_tokens)
    rows, room = state.tokens.shape
    for name, value, count in (("row", row, rows), ("of", of, ctx.rows)):
        if not isinstance(value, jax.core.Tracer) and not 0 <= operator.index(value) < count:
            raise InputError(f"{name}={value} does not exist: there are rows 0 to {count - 1}")
    if max_new_tokens > room:
        raise InputError(f"max_new_tokens={max_new_tokens} is more than the {room} tokens that the state has room for")
    prompt = Prompt.of(ctx)
    prompt.check_like(state.kv)
    if is_ready(ctx.next_position):
        check_positions(ctx, np.zeros(ctx.rows, np.int32), max_new_tokens)
    stop_ids = state.options.stop_ids.shape[1]
    options = row_options(ctx.model.spec, 1, max_new_tokens, sampling, seed, eos_token_ids, stop_ids, log_probabilities)
    each = [x.reshape(1) if isinstance(x, jax.core.Tracer) else np.array([x], np.int32) for x in (row, of)]
    numbers = (*each, np.int32(1))
    options, numbers = placed((options, numbers), ctx.params)
    with on_mesh_of(ctx.params, state):
        return insert_rows(ctx.model, state, prompt, *numbers, options)


def decode_chunk(
    model: VisionLanguageModel,
    params: Params,
    state: DecodingState,
    steps: int,
    *,
    leave_after: int | None = None,
    kernels: Kernels | None = None,
) -> DecodingState:
    """Runs the rows that are not done for some steps, on the device, and waits for nothing: the loop of `generate`.

    Leaves as soon as all rows are done, or as `leave_after` rows have ended in this call, so that they can be filled
    again. Another number of either compiles nothing.

    Args:
      model: of the contexts.
      params: its parameters.
      state: from `empty_rows`, `insert` or `decode_chunk`. What a step changes of it is donated, so go on with the one
        returned.
      steps: at most so many tokens are added to an answer.
      leave_after: rows; None for all. With 1 no row waits to be filled; with an eighth of the rows, they stand idle for
        an eighth of the time at most, and the loop is left less often.
      kernels: which implementations to use; the platform's best by default.

    Returns:
      The state. `done`, `step`, `tokens` and `kv.finite` say what has become of the rows; reading waits for the device.

    Raises:
      InputError: a number below 1.

    Example:
      state = vlc.decode_chunk(vlm.model, vlm.params, state, steps=16, leave_after=1)
    """
    leave_after = len(state.done) if leave_after is None else leave_after
    check_count("steps", steps)
    check_count("leave_after", leave_after)
    stores = () if state.kv.decoding.rewrites_context else state.kv.stores
    numbers = placed((np.int32(steps), np.int32(leave_after)), params)
    rest = dataclasses.replace(state, kv=without_stores(state.kv))
    with on_mesh_of(params, state):
        rest = chunk(model, params, stores, rest, *numbers, kernels or Kernels())
    return dataclasses.replace(rest, kv=with_stores(rest.kv, stores))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """What a context and the rows made for it have in common: its state without a tail, and its logits."""

    kv: KVState
    logits: jax.Array

    @classmethod
    def of(cls, ctx: Context) -> "Prompt":
        context, *more = ctx.stores
        parts: dict[str, Any] = {
            "context": context,
            "tail": None,
            "next_position": ctx.next_position,
            "next_index": ctx.next_index,
            "allocation": Allocation(ctx.report.kept, ctx.report.density),  # a context from a file has no more
            "finite": ctx.report.finite,
            "decoding": ctx.decoding,
            "more": tuple(more),
            "observed": ctx.observed,
        }
        return cls(KVState(**parts), ctx.logits)

    def check_like(self, kv: KVState) -> None:
        """Raises InputError if a row of it would not fit into a state."""
        if self.kv.decoding != kv.decoding:
            raise InputError(
                f"the context's rule for generated tokens is {self.kv.decoding}, that of the state is {kv.decoding}: "
                "make another state, with empty_rows(ctx, ...)"
            )

        def leaves(kv: KVState) -> dict[str, tuple[Any, int]]:
            axes = jax.tree.map(lambda _: -1, kv)
            if not kv.decoding.rewrites_context:  # else a row may have fewer slots
                axes = with_stores(without_stores(axes), tuple(store.slot_axes() for store in kv.stores))
            paths = jax.tree_util.tree_leaves_with_path(kv)
            return {jax.tree_util.keystr(path): (x, axis) for (path, x), axis in zip(paths, jax.tree.leaves(axes))}

        def fits(ours: tuple[Any, int], theirs: tuple[Any, int]) -> bool:
            (x, axis), (room, _) = ours, theirs
            sizes = [(a, b) for i, (a, b) in enumerate(zip(x.shape, room.shape)) if i not in (0, axis)]
            enough = axis < 0 or x.shape[axis] <= room.shape[axis]
            return x.dtype == room.dtype and x.ndim == room.ndim and all(a == b for a, b in sizes) and enough

        def text(leaf: tuple[Any, int] | None) -> str | None:
            return leaf and f"{leaf[0].dtype} {list(leaf[0].shape[1:])}"

        ours, theirs = leaves(self.kv), leaves(dataclasses.replace(kv, tail=None))  # type: ignore[arg-type]
        for name in {**theirs, **ours}:
            if name not in ours or name not in theirs or not fits(ours[name], theirs[name]):
                raise InputError(
                    f"a row of the context has {name.lstrip('.')} of {text(ours.get(name))}, a row of the state of "
                    f"{text(theirs.get(name))}: a state holds contexts of one policy, one prompt bucket or smaller "
                    "ones, and as many appended turns; make another, with empty_rows(ctx, ...)"
                )


@partial(jax.jit, static_argnames=("model", "rows", "room", "top_count"))
@automatic
def free_rows(
    model: VisionLanguageModel,
    prompt: Prompt,
    options: RowOptions,
    rows: int,
    room: int,
    top_count: int | None = None,
) -> DecodingState:
    """`empty_rows`, of the shapes of a prompt's rows; `top_count` as in `loop.begun`."""
    free = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), prompt)
    tail = TailStore.empty(model.spec, rows, free.kv.decoding.tail_tokens(room))
    state = begun(model, free.logits, dataclasses.replace(free.kv, tail=tail), options, room, top_count)
    return split(dataclasses.replace(state, done=jnp.ones((rows,), bool), step=jnp.zeros((rows,), jnp.int32)))


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
@automatic
def insert_rows(
    model: VisionLanguageModel,
    state: DecodingState,
    prompt: Prompt,
    rows: jax.Array,
    of: jax.Array,
    count: jax.Array,
    options: RowOptions,
) -> DecodingState:
    """Begins answers in rows[:count], i32 [n], to the rows of[:count] of a prompt, as options [n] say.

    Writes all but the tail, whose slots are free and stay as they are; and of the state's slots as many as the prompt
    has, which may be fewer. One row after another, by slices: a scatter would copy the pool on a TPU.
    """

    def row_of(x: jax.Array, index: jax.Array) -> jax.Array:
        return index * x.shape[0] // len(prompt.logits)  # stores may have fewer rows

    def put(to: jax.Array, x: jax.Array, row: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(to, x.astype(to.dtype), (row, *[jnp.int32(0)] * (to.ndim - 1)))

    large = {name: getattr(prompt.kv, name) for name in ("context", "more", "observed")}
    small = dataclasses.replace(prompt, kv=dataclasses.replace(prompt.kv, **dict.fromkeys(large)))  # type: ignore[arg-type]
    small = jax.tree.map(lambda x: x[row_of(x, of)], small)
    fresh = begun(model, small.logits, small.kv, options, state.tokens.shape[1], state.top_count)

    def begin_row(i: jax.Array, state: DecodingState) -> DecodingState:
        one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), fresh)
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row_of(x, of[i]), 1), large)
        one = dataclasses.replace(one, kv=dataclasses.replace(one.kv, **own))
        tail = state.kv.tail
        rest = dataclasses.replace(state, kv=dataclasses.replace(state.kv, tail=None))  # type: ignore[arg-type]
        new = jax.tree.map(lambda to, x: put(to, x, rows[i]), rest, one)
        tail = dataclasses.replace(tail, length=put(tail.length, jnp.zeros((1,), jnp.int32), rows[i]))
        return dataclasses.replace(new, kv=dataclasses.replace(new.kv, tail=tail))

    return split(jax.lax.fori_loop(0, count, begin_row, state))


def split(state: DecodingState) -> DecodingState:
    """Places a state over the mesh, as its parts say."""
    if jax.sharding.get_abstract_mesh().empty:
        return state
    return jax.tree.map(jax.lax.with_sharding_constraint, state, specs_of(state))
