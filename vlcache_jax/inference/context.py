"""Compress once, ask many: a compressed prompt that serves any number of questions, samples and turns.

    ctx = compress(model, params, batch, policy)      prefill; what the policy keeps
    out = answer(ctx, questions)                      each question is one block, each answer a loop on the device
    ctx = extend(ctx, questions, out)                 the next turn of the conversation starts from here

A context is never changed and never repeated: every question reads the same buffers (`kernels.decode_attention.union`).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.geometry import align, answer_room
from vlcache_jax.cache.state import Allocation, KVState
from vlcache_jax.cache.store import PackedStore
from vlcache_jax.cache.tail import TailStore
from vlcache_jax.errors import InputError, PolicyError
from vlcache_jax.files.exporting import exportable
from vlcache_jax.inference.append_block import append_block
from vlcache_jax.inference.finiteness import finite_rows, require_finite
from vlcache_jax.inference.generate import Generation, decode_all
from vlcache_jax.inference.prefill import prefill
from vlcache_jax.inference.report import Report, make_report
from vlcache_jax.inference.row_options import Samplings, StopIds, row_options
from vlcache_jax.inputs import Array, Batch, Continuation
from vlcache_jax.parallel.mesh import automatic, is_known, on_mesh_of
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.placing import placed
from vlcache_jax.parallel.seeds import Seeds, seed_words
from vlcache_jax.policies.decoding.rules import APPEND
from vlcache_jax.policies.methods.full_cache import FullCache
from vlcache_jax.policies.policy import Policy
from vlcache_jax.typing import Params, VisionLanguageModel


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """Compressed prompts that can be asked, as often as one likes. A pytree; immutable.

    Attributes:
      model: the model that it belongs to (static).
      params: its parameters: a reference, not a copy.
      stores: the kept part of the prompt, then what was appended. Stores of earlier stages may have fewer rows: a
        divisor of `rows`; consecutive rows share theirs.
      next_position: i32 [rows]. Position of the next token.
      logits: f32 [rows, vocab]. Of the next token.
      report: what `compress` kept; its `finite` is of the context's rows.
      room: slots a layer has in the last store, if that was appended; 0 otherwise (static).
    """

    model: VisionLanguageModel = dataclasses.field(metadata={"static": True})
    params: Params
    stores: tuple[PackedStore, ...]
    next_position: jax.Array
    logits: jax.Array
    report: Report
    room: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def rows(self) -> int:
        """Prompts, or branches of them."""
        return self.next_position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all its stores."""
        return sum(store.nbytes for store in self.stores)

    def start(self, max_new_tokens: int, rows: int | None = None) -> tuple[jax.Array, KVState]:
        """What `decode`, `stream_decode` and `decode_step` go on from, for loops of one's own.

        Args:
          max_new_tokens: room for generated tokens.
          rows: a multiple of the context's rows, for several branches of each; the context's own by default.

        Returns:
          (logits of the next token f32 [rows, vocab], state); the state holds the context's own buffers.

        Raises:
          InputError: max_new_tokens below 1, more positions than the model has, or rows that are no multiple.
        """
        rows = self.rows if rows is None else rows
        if rows < 1 or rows % self.rows:
            raise InputError(f"rows={rows} is not a multiple of the context's {self.rows} rows")
        _check_count("max_new_tokens", max_new_tokens)
        _check_positions(self, np.zeros(self.rows, np.int32), max_new_tokens)
        with on_mesh_of(self.params, self.stores):
            logits, next_position, finite, tail = _start(
                self.model, self.logits, self.next_position, self.report.finite, rows, answer_room(max_new_tokens)
            )
        allocation = Allocation(requested=self.report.kept, density=self.report.density)
        return logits, KVState(self.stores[0], tail, next_position, allocation, finite, APPEND, self.stores[1:])


def compress(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    policy: Policy | None = None,
    *,
    kernels: Kernels | None = None,
) -> Context:
    """Runs prompts and keeps of their cache what the policy says, without room for answers. Pure, like `prefill`.

    A prompt may end anywhere. Where it ends before the question, choose a policy that needs none (docs/contexts.md).

    Args:
      model: a Flax module such as `vlm.model`.
      params: its parameters.
      batch: prompts, from `vlm.processor`.
      policy: what to keep; `FullCache()` by default.
      kernels: which implementation of each op to use; the platform's best by default.

    Returns:
      The context, of as many rows as the batch.

    Raises:
      InputError, PolicyError: see `prefill`; PolicyError also for a rule that forgets what was generated.
      NonFiniteError: scores or logits that are not finite, once all has run; see `generate`.

    Example:
      ctx = vlc.compress(vlm.model, vlm.params, batch, vlc.KeyDifference(budget=0.2))
    """
    policy = FullCache() if policy is None else policy
    if isinstance(policy, Policy) and policy.rule != APPEND:
        raise PolicyError(
            f"policy {policy.name!r} has the rule generated={policy.generated} for answers, but a context keeps every "
            "answer whole and is never rewritten: use generated=Append()"
        )
    logits, state = prefill(model, params, batch, policy, 1, kernels=kernels)
    report = make_report(model.spec, policy, state, state.next_position, batch.length)
    report = dataclasses.replace(report, tail_bytes=0)
    ctx = Context(model, params, state.stores, state.next_position, logits, report)
    density = report.density
    require_finite(report.finite, ctx, dtype=model.spec.dtype, before=report.finite, density=density, policy=policy)
    return ctx


def extend(ctx: Context, *blocks: Continuation | Generation, kernels: Kernels | None = None) -> Context:
    """A context that goes on: the text of all blocks, in their order, is appended uncompressed. Pure.

    The old context stays as it is, and its buffers are those of the new one; only what was appended to it row by row
    before is copied, so that a conversation keeps to two stores.

    Args:
      ctx: the context.
      blocks: questions, answers, anything with `tokens` i32 [..., length] and `lengths` i32 [...]. Each has the same
        number of entries, a multiple of the context's rows: consecutive ones belong to the same row.
      kernels: as in `compress`.

    Returns:
      A context with a row for every entry.

    Raises:
      InputError: no blocks, numbers of entries that do not fit, or (outside `jit`, where they are known) lengths out of
        range or more positions than the model has.
      NonFiniteError: logits that are not finite; see `generate`.

    Example:
      ctx = vlc.extend(ctx, questions, vlc.answer(ctx, questions))
    """
    new = _extend(ctx, blocks, kernels, new_tokens=0)
    require_finite(new.report.finite, new, dtype=ctx.model.spec.dtype, density=new.report.density)
    return new


def _extend(ctx: Context, blocks: Sequence[Any], kernels: Kernels | None, new_tokens: int) -> Context:
    """`extend`, if `new_tokens` more have their place, too."""
    tokens, lengths = _joined(placed([_flat(block, ctx.rows) for block in blocks], ctx.params))
    rows, length = tokens.shape
    _check_positions(ctx, lengths, new_tokens)
    join = bool(ctx.room) and rows == ctx.rows
    room = int(align(length))
    if join:
        room = _join_room(ctx, lengths, length)
    with on_mesh_of(ctx.params, ctx.stores, tokens):
        logits, store = append_block(
            ctx.model,
            ctx.params,
            ctx.stores,
            ctx.next_position,
            tokens,
            lengths,
            room,
            ctx.room if join else 0,
            kernels or Kernels(),
        )
    next_position, finite = _moved_on(ctx.next_position, ctx.report.finite, lengths, logits)
    return dataclasses.replace(
        ctx,
        stores=(*(ctx.stores[:-1] if join else ctx.stores), store),
        next_position=next_position,
        logits=logits,
        report=dataclasses.replace(ctx.report, finite=finite),
        room=room,
    )


@jax.jit
@automatic
def _moved_on(
    next_position: jax.Array, finite: jax.Array, lengths: jax.Array, logits: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The next position and the flags after a block of [rows] `lengths`."""
    rows = lengths.shape[0]
    return _branches(next_position, rows) + lengths, _branches(finite, rows) & finite_rows(logits)


def answer(
    ctx: Context,
    questions: Continuation | None = None,
    max_new_tokens: int = 64,
    *,
    samples: int | None = None,
    sampling: Samplings = None,
    seeds: Seeds = 0,
    eos_token_ids: StopIds = None,
    kernels: Kernels | None = None,
) -> Generation:
    """Answers questions to a context, all at once; the context is neither copied nor repeated. Pure, like `generate`.

    Args:
      ctx: from `compress`, `extend` or `load_context`.
      questions: from `vlm.processor.continuation`: one or several for each row of the context. None: the prompt itself
        ends in the question.
      max_new_tokens: answers are cut at this length.
      samples: answers to each question; None for one, without an axis of its own.
      sampling: None for greedy decoding.
      seeds: one, or an array of the answers' leading axes, or broadcast to them; integers or keys, as in `generate`.
        With a single one sample i draws with seed + i. A draw depends on its own seed, never on the others.
      eos_token_ids: ids that end an answer; those of the checkpoint by default. An empty list never stops.
      kernels: as in `compress`.

    Returns:
      tokens i32 [..., max_new_tokens] and lengths i32 [...]; the leading axes are those of the questions, [rows]
      without questions, and one more, of the samples, with samples. The report is the context's, with the bytes of
      the answers' tail.

    Raises:
      InputError: see `extend`; max_new_tokens below 1, more positions than the model has, seeds that do not fit, or
        samples below 1, or above 1 without sampling.
      NonFiniteError: logits that are not finite; see `generate`.

    Example:
      questions = vlm.processor.continuation([["What is it?", "What colour is it?"]])
      out = vlc.answer(ctx, questions, max_new_tokens=32)
      [[first, second]] = vlm.processor.decode(out)
    """
    _check_count("max_new_tokens", max_new_tokens)
    if samples is not None:
        _check_count("samples", samples)
        if samples > 1 and sampling is None:
            raise InputError(f"samples={samples} greedy answers would all be the same: give sampling=Sampling(...)")
    lead = (ctx.rows,) if questions is None else np.shape(getattr(questions, "lengths", ()))
    shape = lead if samples is None else (*lead, samples)
    seeds = seed_words(seeds, shape, samples, f"answers {shape}").reshape(-1, 2)
    options = row_options(ctx.model.spec, len(seeds), max_new_tokens, sampling, seeds, eos_token_ids)
    asked = ctx if questions is None else _extend(ctx, (questions,), kernels, max_new_tokens)
    logits, state = asked.start(max_new_tokens, asked.rows * (samples or 1))
    tokens, lengths, finite = decode_all(ctx.model, ctx.params, logits, state, max_new_tokens, options, kernels)
    report = dataclasses.replace(ctx.report, tail_bytes=state.tail.nbytes, finite=finite.reshape(shape))
    out = Generation(tokens.reshape(*shape, max_new_tokens), lengths.reshape(shape), report)
    before = state.finite.reshape(shape)
    require_finite(report.finite, out, dtype=ctx.model.spec.dtype, before=before, density=report.density)
    return out


@partial(jax.jit, static_argnames=("model", "rows", "room"))
@automatic
def _start(
    model: VisionLanguageModel,
    logits: jax.Array,
    next_position: jax.Array,
    finite: jax.Array,
    rows: int,
    room: int,
) -> tuple[jax.Array, jax.Array, jax.Array, TailStore]:
    tail = TailStore.empty(model.spec, rows, room)
    return _branches(logits, rows), _branches(next_position, rows), _branches(finite, rows), tail


def _branches(x: jax.Array, rows: int) -> jax.Array:
    """Repeats each of the context's rows for its branches."""
    return x if rows == x.shape[0] else jnp.repeat(x, rows // x.shape[0], axis=0)


def _flat(block: Any, rows: int) -> tuple[Array, Array]:
    """Tokens [entries, length] and lengths [entries] of a block."""
    if not (hasattr(block, "tokens") and hasattr(block, "lengths")):
        raise InputError(
            f"a {type(block).__name__} cannot be appended to a context: give what processor.continuation or answer "
            "returned"
        )
    tokens, lengths = (x if hasattr(x, "shape") else np.asarray(x) for x in (block.tokens, block.lengths))
    if tokens.ndim < 2 or tokens.shape[:-1] != lengths.shape or not tokens.size:
        raise InputError(f"tokens {tokens.shape} and lengths {lengths.shape}: want [..., length] and [...]")
    if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (tokens, lengths)):
        raise InputError(f"tokens of {tokens.dtype} and lengths of {lengths.dtype}: want whole numbers")
    tokens, lengths = tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1)
    if len(tokens) % rows:
        raise InputError(
            f"{len(tokens)} questions cannot be shared out to the context's {rows} rows: give each row equally many"
        )
    if is_known(lengths):
        low, high = int(np.min(jax.device_get(lengths))), int(np.max(jax.device_get(lengths)))
        if low < 1 or high > tokens.shape[1]:
            raise InputError(f"lengths from {low} to {high} must lie between 1 and the padded length {tokens.shape[1]}")
    return tokens, lengths


def _joined(blocks: list[tuple[Array, Array]]) -> tuple[jax.Array, jax.Array]:
    """One block of text from several, without the padding between them."""
    if not blocks:
        raise InputError("there is nothing to append: give at least one block, from processor.continuation or answer")
    if len({len(lengths) for _, lengths in blocks}) > 1:
        raise InputError(f"the blocks have {[len(lengths) for _, lengths in blocks]} entries: give equally many")
    return _concatenated(blocks)


@jax.jit
def _concatenated(blocks: list[tuple[Array, Array]]) -> tuple[jax.Array, jax.Array]:
    tokens, lengths = (jnp.asarray(x, jnp.int32) for x in blocks[0])
    for more, more_lengths in blocks[1:]:
        both = jnp.concatenate([tokens, jnp.asarray(more, jnp.int32)], axis=1)
        index, n = jax.lax.iota(jnp.int32, both.shape[1])[None], lengths[:, None]
        index = jnp.where(index < n, index, jnp.minimum(tokens.shape[1] + index - n, both.shape[1] - 1))
        tokens, lengths = jnp.take_along_axis(both, index, axis=1), lengths + jnp.asarray(more_lengths, jnp.int32)
    return tokens, lengths


def _join_room(ctx: Context, lengths: jax.Array, length: int) -> int:
    """Slots a layer needs for the earlier turns and a new one: a power of two, so that few programs are compiled."""
    needed, old = ctx.room + length, ctx.stores[-1].lengths  # i32 [rows, layers, 1], equal over the layers
    if is_known(old) and is_known(lengths):
        needed = int(np.max(jax.device_get(old)[:, 0, 0] + jax.device_get(lengths)))
    return max(int(align(1)), 1 << (needed - 1).bit_length())


def _check_positions(ctx: Context, appended: Any, new_tokens: int) -> None:
    """`appended` tokens of each entry, then as many new ones, must have a position."""
    if not (is_known(ctx.next_position) and is_known(appended)):
        return
    before, appended = jax.device_get(ctx.next_position), jax.device_get(appended)
    before = np.repeat(before, len(appended) // len(before))
    needed, most = before + appended + new_tokens, ctx.model.spec.max_positions
    row = int(np.argmax(needed))
    if needed[row] > most:
        raise InputError(
            f"row {row} needs {needed[row]} positions ({before[row]} of the context + {appended[row]} appended + "
            f"{new_tokens} new ones) but the model has {most}: shorten the text or lower max_new_tokens"
        )


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name}={value!r}: give a whole number of at least 1")
