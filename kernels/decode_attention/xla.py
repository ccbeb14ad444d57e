"""Blocks of slots in plain XLA, as many as the longest segment needs.

Several segments of a query, the kept prompt and the generated tokens, share one softmax: their first blocks are read
together, which for short segments is all there is, and what is left of each in a loop of its own.

    segment 0   [ first block ][ block ][ block ] ...
    segment 1   [ first block ][ block ] ...
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.decode_attention.types import Segments, Store
from vlcache_jax.kernels.varying import varying

# Slots read at once: larger blocks fall out of a CPU's cache; on a GPU what a step launches costs more than idle slots.
_SMALLEST, LARGEST, WIDE = 32, 128, 512
_LARGE_STORE = 3072  # slots

_MASKED = float(jnp.finfo(jnp.float32).min)
_LOWEST = _MASKED / 2  # exp(_MASKED - _LOWEST) = 0: a block without slots needs no second mask

Part = tuple[Store, Segments]
State = tuple[jax.Array, jax.Array, jax.Array]
"""Highest logit, sum of weights, sum of weighted values; of each query head."""


def decode_attention(
    query: jax.Array, parts: Sequence[Part], *, scale: float, largest: int = LARGEST
) -> tuple[jax.Array, jax.Array]:
    """Attention of query [batch, heads, head_dim] over the union of its segments in float stores.

    The heads of an item share their segment: all heads of a row if offsets are [batch, 1], else one KV head. At most
    `largest` slots are read at once.
    """
    batch, heads, head_dim = query.shape
    lanes = parts[0][0].lanes
    items = max(segments.lengths.shape[1] for _, segments in parts)  # of a row
    lanes_per_item = lanes if items == 1 else 1
    # [batch, items, lanes of the item, query heads of the lane, head_dim]
    q = query.reshape(batch, items, lanes_per_item, -1, head_dim)

    def attend(i: jax.Array | int, parts: Sequence[Part], highest: jax.Array | float) -> State:
        """Block i of the parts; weights are relative to the highest logit, of those before them at least."""
        blocks = [_block(store, segments, i, items, lanes_per_item, largest) for store, segments in parts]
        k, v, inside = (jnp.concatenate(x, axis=3) if len(x) > 1 else x[0] for x in zip(*blocks, strict=True))
        logits = scale * jnp.einsum("bilhd,bilsd->bilhs", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(inside.swapaxes(3, 4), logits, _MASKED)
        highest = jnp.maximum(highest, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - highest[..., None])
        out = jnp.einsum("bilhs,bilsd->bilhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return highest, jnp.sum(weights, axis=-1), out

    def step(i: jax.Array, state: State, part: Part) -> State:
        new = attend(i, [part], state[0])
        decay = jnp.exp(state[0] - new[0])
        return new[0], state[1] * decay + new[1], state[2] * decay[..., None] + new[2]

    state = varying(attend(0, parts, _LOWEST), query, parts)
    for part in parts:
        block = block_size(part[0].slots, largest)
        if block < part[0].slots:
            blocks = (jnp.max(part[1].lengths) + block - 1) // block
            state = jax.lax.fori_loop(1, blocks, partial(step, part=part), state)
    highest, total, out = state
    empty = total == 0
    out = out / jnp.where(empty, 1, total)[..., None]
    lse = jnp.where(empty, -jnp.inf, highest + jnp.log(jnp.where(empty, 1, total)))
    return out.reshape(batch, heads, head_dim), lse.reshape(batch, heads)


def block_size(slots: int, largest: int) -> int:
    """Slots read at once: `largest` of a large store, fewer of a small one, whose segments are short."""
    share = largest * slots // _LARGE_STORE // 16 * 16
    return min(slots, max(_SMALLEST, min(largest, share)))


def _block(
    store: Store, segments: Segments, i: jax.Array | int, items: int, lanes_per_item: int, largest: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block i of a segment: keys and values [batch, items, lanes of the item, block, d], and which slots count."""
    batch, lanes, slots, head_dim = store.keys.shape
    block = block_size(slots, largest)
    offsets, lengths = (jnp.broadcast_to(x, (batch, items)) for x in (segments.offsets, segments.lengths))
    lane = jax.lax.iota(jnp.int32, items) * lanes // items
    wanted = offsets + i * block
    start = jnp.clip(wanted, 0, slots - block)  # the last block of the store is shifted back to fit
    slot = start[..., None] + jax.lax.iota(jnp.int32, block)[None, None]
    inside = (slot >= wanted[..., None]) & (slot < (offsets + lengths)[..., None])
    inside = inside[:, :, None, :, None]

    def read(row: jax.Array, lane: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(row, (lane, first, 0), (lanes_per_item, block, head_dim))

    keys, values = (
        jax.vmap(jax.vmap(read, (None, 0, 0)), (0, None, 0))(x, lane, start) for x in (store.keys, store.values)
    )
    return keys, jnp.where(inside, values, 0), inside  # 0 * NaN would be NaN
