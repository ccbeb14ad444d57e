"""Text appended to a context: questions, answers, the turns of a conversation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.geometry import align
from vlcache_jax.errors import InputError, PolicyError
from vlcache_jax.inference.append_block import append_block
from vlcache_jax.inference.context import Context, branches, check_positions
from vlcache_jax.inference.finiteness import finite_rows, require_finite
from vlcache_jax.inputs import Array
from vlcache_jax.parallel.mesh import automatic, is_known, on_mesh_of
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.placing import placed


def extend(ctx: Context, *blocks: Any, kernels: Kernels | None = None) -> Context:
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
      PolicyError: the context's rule for generated tokens rewrites what was kept, in which a block has no place.
      InputError: no blocks, numbers of entries that do not fit, or (outside `jit`, where they are known) lengths out of
        range or more positions than the model has.
      NonFiniteError: logits that are not finite; see `generate`.

    Example:
      ctx = vlc.extend(ctx, questions, vlc.answer(ctx, questions))
    """
    new = extended(ctx, blocks, kernels, new_tokens=0)
    require_finite(new.report.finite, new, dtype=ctx.model.spec.dtype, density=new.report.density)
    return new


def extended(ctx: Context, blocks: Sequence[Any], kernels: Kernels | None, new_tokens: int) -> Context:
    """`extend`, if `new_tokens` more have their place, too."""
    tokens, lengths = appended(ctx, blocks, new_tokens)
    rows, length = tokens.shape
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
            ctx.next_index,
            tokens,
            lengths,
            room,
            ctx.room if join else 0,
            kernels or Kernels(),
        )
    following = (ctx.next_position, ctx.next_index)
    (next_position, next_index), finite = _moved_on(following, ctx.report.finite, lengths, logits)
    return dataclasses.replace(
        ctx,
        stores=(*(ctx.stores[:-1] if join else ctx.stores), store),
        next_position=next_position,
        next_index=next_index,
        logits=logits,
        report=dataclasses.replace(ctx.report, finite=finite),
        room=room,
    )


def appended(ctx: Context, blocks: Sequence[Any], new_tokens: int = 0) -> tuple[jax.Array, jax.Array]:
    """The tokens i32 [rows, length] and lengths i32 [rows] of blocks behind a context, checked; see `extend`."""
    if ctx.decoding.rewrites_context:
        raise PolicyError(
            f"policy {ctx.report.policy!r} has the rule decoding={ctx.decoding} for answers, which rewrites what was "
            "kept: nothing can be appended to its context; answer the prompt itself, or use decoding=Append()"
        )
    tokens, lengths = _joined(placed([_flat(block, ctx.rows) for block in blocks], ctx.params))
    check_positions(ctx, lengths, new_tokens)
    return tokens, lengths


@jax.jit
@automatic
def _moved_on(
    following: tuple[jax.Array, jax.Array], finite: jax.Array, lengths: jax.Array, logits: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The next position and index, and the flags, after a block of [rows] `lengths`."""
    rows = lengths.shape[0]
    return tuple(branches(x, rows) + lengths for x in following), branches(finite, rows) & finite_rows(logits)


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
