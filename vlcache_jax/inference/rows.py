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
        return _empty(ctx.model, _Prompt.of(ctx), options, rows, answer_room(max_new_tokens))


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
) -> DecodingState:
    """Begins the answer to a context in one row of a running state; what the row held is gone.

    Copies the bytes of one row of the context, in place: the state is donated, so go on with the one returned.

    Args:
      state: from `empty_rows`, `insert` or `decode_chunk`.
      row: which row of the state.
      ctx: of the shapes that the state was made for.
      max_new_tokens: the answer is cut at this length; at most the state's room.
      of: which of the context's rows.
      sampling: None for greedy decoding.
      seed: an integer or a key, as in `generate`.
      eos_token_ids: ids that end the answer; those of the checkpoint by default. An empty list never stops.

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
    prompt = _Prompt.of(ctx)
    prompt.check_like(state.kv)
    if is_ready(ctx.next_position):
        check_positions(ctx, np.zeros(ctx.rows, np.int32), max_new_tokens)
    stop_ids = state.options.stop_ids.shape[1]
    options = row_options(ctx.model.spec, 1, max_new_tokens, sampling, seed, eos_token_ids, stop_ids)
    numbers = [x if isinstance(x, jax.core.Tracer) else np.int32(x) for x in (row, of)]
    options, numbers = placed((options, numbers), ctx.params)
    with on_mesh_of(ctx.params, state):
        return _insert(ctx.model, state, prompt, *numbers, options)


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
class _Prompt:
    """What a context and the rows made for it have in common: its state without a tail, and its logits."""

    kv: KVState
    logits: jax.Array

    @classmethod
    def of(cls, ctx: Context) -> "_Prompt":
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

        def shapes(tree: Any) -> dict[str, str]:
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            return {jax.tree_util.keystr(path): f"{x.dtype} {list(x.shape[1:])}" for path, x in leaves}

        ours, theirs = shapes(self.kv), shapes(dataclasses.replace(kv, tail=None))  # type: ignore[arg-type]
        for name in {**theirs, **ours}:
            if ours.get(name) != theirs.get(name):
                raise InputError(
                    f"a row of the context has {name.lstrip('.')} of {ours.get(name)}, a row of the state of "
                    f"{theirs.get(name)}: a state holds contexts of one policy, one prompt bucket and as many appended "
                    "turns; make another, with empty_rows(ctx, ...)"
                )

    def row(self, row: jax.Array) -> "_Prompt":
        """One of its rows; stores may have fewer."""
        rows = len(self.logits)

        def take(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, row * x.shape[0] // rows, 1)

        return jax.tree.map(take, self)


@partial(jax.jit, static_argnames=("model", "rows", "room"))
@automatic
def _empty(model: VisionLanguageModel, prompt: _Prompt, options: RowOptions, rows: int, room: int) -> DecodingState:
    free = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), prompt)
    tail = TailStore.empty(model.spec, rows, free.kv.decoding.tail_tokens(room))
    state = begun(model, free.logits, dataclasses.replace(free.kv, tail=tail), options, room)
    return split(dataclasses.replace(state, done=jnp.ones((rows,), bool), step=jnp.zeros((rows,), jnp.int32)))


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
@automatic
def _insert(
    model: VisionLanguageModel,
    state: DecodingState,
    prompt: _Prompt,
    row: jax.Array,
    of: jax.Array,
    options: RowOptions,
) -> DecodingState:
    """Writes a row of everything but the tail, whose slots are free and stay as they are."""
    one, tail = prompt.row(of), state.kv.tail
    fresh = begun(model, one.logits, one.kv, options, state.tokens.shape[1])

    def put(rows: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, x.astype(rows.dtype), row, axis=0)

    def without_tail(state: DecodingState) -> DecodingState:
        return dataclasses.replace(state, kv=dataclasses.replace(state.kv, tail=None))  # type: ignore[arg-type]

    new = jax.tree.map(put, without_tail(state), fresh)
    tail = dataclasses.replace(tail, length=put(tail.length, jnp.zeros((1,), jnp.int32)))
    return split(dataclasses.replace(new, kv=dataclasses.replace(new.kv, tail=tail)))


def split(state: DecodingState) -> DecodingState:
    """Places a state over the mesh, as its parts say."""
    if jax.sharding.get_abstract_mesh().empty:
        return state
    return jax.tree.map(jax.lax.with_sharding_constraint, state, specs_of(state))
