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
from vlcache_jax.kernels.precision import PRECISIONS, Coded
from vlcache_jax.kernels.varying import varying

# Slots read at once: larger blocks fall out of a CPU's cache; on a GPU what a step launches costs more than idle slots.
_SMALLEST, LARGEST, WIDE = 32, 128, 512
_LARGE_STORE = 3072  # slots

_MASKED = float(jnp.finfo(jnp.float32).min)
_LOWEST = _MASKED / 2  # exp(_MASKED - _LOWEST) = 0: a block without slots needs no second mask

Part = tuple[Store, Segments]
State = tuple[jax.Array, jax.Array, jax.Array]
"""Highest logit, sum of weights, sum of weighted values; of each query and head."""


def decode_attention(
    query: jax.Array, parts: Sequence[Part], *, scale: float, causal: bool = False, largest: int = LARGEST
) -> tuple[jax.Array, jax.Array]:
    """Attention of query [batch, n, heads, head_dim] over the union of its segments; see `api.decode_attention`.

    The heads of an item share their segment: all heads of a row if offsets are [batch, 1], else one KV head. At most
    `largest` slots are read at once.
    """
    batch, n, heads, head_dim = query.shape
    items = max(segments.lengths.shape[1] for _, segments in parts)  # of a row
    lanes = parts[0][0].lanes if items == 1 else 1  # of an item
    group = heads // (items * lanes)  # query heads of a lane
    q = query.reshape(batch, n, items, lanes, group, head_dim).transpose(0, 2, 3, 1, 4, 5)
    q = q.reshape(batch, items, lanes, n * group, head_dim)
    # Of each row of q: how many of the segment's last slots it does not see.
    hidden = jnp.repeat(n - 1 - jax.lax.iota(jnp.int32, n), group) if causal else jnp.zeros(1, jnp.int32)

    def attend(i: jax.Array | int, parts: Sequence[Part], highest: jax.Array | float) -> State:
        """Block i of the parts; weights are relative to the highest logit, of those before them at least."""
        blocks = [
            _block(store, segments, i, items, lanes, group, hidden, _block_of(store, n, largest))
            for store, segments in parts
        ]
        k, v, seen = (jnp.concatenate(x, axis=a) if len(x) > 1 else x[0] for x, a in zip(zip(*blocks), (3, 3, 4)))
        k, v = (x.astype(query.dtype) if parts[0][0].bits is not None else x for x in (k, v))
        logits = scale * jnp.einsum("bilhd,bilsd->bilhs", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(seen, logits, _MASKED)
        highest = jnp.maximum(highest, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - highest[..., None])
        out = jnp.einsum("bilhs,bilsd->bilhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return highest, jnp.sum(weights, axis=-1), out

    def step(i: jax.Array, state: State, part: Part) -> State:
        new = attend(i, [part], state[0])
        decay = jnp.exp(state[0] - new[0])
        return new[0], state[1] * decay + new[1], state[2] * decay[..., None] + new[2]

    zeros = jnp.zeros(q.shape, jnp.float32)
    state = (jnp.full(q.shape[:-1], _LOWEST, jnp.float32), zeros[..., 0], zeros)
    ahead = all(_plain(store, n) for store, _ in parts)  # else one loop has all of it: a smaller program
    state = varying(attend(0, parts, _LOWEST) if ahead else state, query, parts)
    for store, segments in parts:
        block = _block_of(store, n, largest)
        if not ahead or block < store.slots:
            blocks = (jnp.max(segments.lengths + _before(store, segments)) + block - 1) // block
            state = jax.lax.fori_loop(int(ahead), blocks, partial(step, part=(store, segments)), state)
    highest, total, out = state
    empty = total == 0
    out = out / jnp.where(empty, 1, total)[..., None]
    lse = jnp.where(empty, -jnp.inf, highest + jnp.log(jnp.where(empty, 1, total)))

    def per_row(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, items, lanes, n, group, -1).transpose(0, 3, 1, 2, 4, 5)
        return x.reshape(batch, n, heads, -1)

    return per_row(out), per_row(lse)[..., 0]


def block_size(slots: int, largest: int) -> int:
    """Slots read at once: `largest` of a large store, fewer of a small one, whose segments are short."""
    share = largest * slots // _LARGE_STORE // 16 * 16
    return min(slots, max(_SMALLEST, min(largest, share)))


def _plain(store: Store, queries: int) -> bool:
    """The case of every decoding step."""
    return queries == 1 and store.bits is None


def _block_of(store: Store, queries: int, largest: int) -> int:
    """Of several queries, and of a store of codes, whose blocks are whole groups, as many as may be."""
    return block_size(store.slots, largest) if _plain(store, queries) else min(largest, store.slots)


def _before(store: Store, segments: Segments) -> jax.Array | int:
    """Slots before a segment that are read with its first block: those of the group that it begins in."""
    return 0 if store.bits is None else segments.offsets % PRECISIONS[store.bits].group


def _block(
    store: Store,
    segments: Segments,
    i: jax.Array | int,
    items: int,
    lanes: int,
    group: int,
    hidden: jax.Array,
    block: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block i of a segment: keys and values [batch, items, lanes of the item, block, d], values that count alone.

    And which slots are seen, bool [batch, items, 1, rows or 1, block].
    """
    shape = (store.keys.shape[0], items)
    offsets, lengths = (jnp.broadcast_to(x, shape) for x in (segments.offsets, segments.lengths))
    lane = jax.lax.iota(jnp.int32, items) * store.lanes // items
    wanted = offsets - _before(store, segments) + i * block
    start = jnp.clip(wanted, 0, store.slots - block)  # the last block of the store is shifted back to fit
    slot = (start[..., None] + jax.lax.iota(jnp.int32, block)[None, None])[:, :, None]  # [batch, items, 1, block]
    after = slot >= jnp.maximum(wanted, offsets)[..., None, None]
    inside = after & (slot < (offsets + lengths)[..., None, None])
    seen = (after & (slot < ((offsets + lengths)[..., None] - hidden[None, None])[..., None]))[:, :, None]
    if segments.skip is not None:
        skip = jnp.repeat(segments.skip, group, axis=1)
        seen &= (slot >= (offsets[..., None] + skip[:, None])[..., None])[:, :, None]

    def cut(x: jax.Array, axis: int = 2, divisor: int = 1) -> jax.Array:
        """The block of [batch, lanes, ...] whose slots lie along an axis, `divisor` to an entry."""
        sizes = [lanes, *x.shape[2:]]
        sizes[axis - 1] = block // divisor

        def read(row: jax.Array, lane: jax.Array, first: jax.Array) -> jax.Array:
            where = [lane, *[jnp.int32(0)] * (row.ndim - 1)]
            where[axis - 1] = first // divisor
            return jax.lax.dynamic_slice(row, where, sizes)

        return jax.vmap(jax.vmap(read, (None, 0, 0)), (0, None, 0))(x, lane, start)

    if store.bits is None:
        keys, values = cut(store.keys), cut(store.values)
    else:
        precision = PRECISIONS[store.bits]
        pieces = (span and cut(x, *span) for x, span in zip(store.coded, precision.spans))
        keys, values = precision.decode(Coded(*pieces))
    return keys, jnp.where(inside[..., None], values, 0), seen  # 0 * NaN would be NaN
