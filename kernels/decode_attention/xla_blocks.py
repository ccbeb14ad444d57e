"""Blocks of queries and quantised stores in plain XLA: a loop over blocks of slots, as far as the longest segment goes.

One query per row over a float store, the case of every decoding step, has its own file.
"""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.decode_attention.types import Segments, Store
from vlcache_jax.kernels.decode_attention.xla import LARGEST
from vlcache_jax.kernels.quantisation import dequantise_keys, dequantise_values, group_size
from vlcache_jax.kernels.varying import varying

_MASKED = float(jnp.finfo(jnp.float32).min)


def decode_attention(
    query: jax.Array, store: Store, segments: Segments, *, scale: float, causal: bool, largest: int = LARGEST
) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_attention`; `query` is [batch, n, heads, head_dim]. At most `largest` slots are read at once."""
    batch, n, heads, head_dim = query.shape
    offsets, lengths = segments.offsets, segments.lengths
    items = lengths.shape[1]  # segments of a row
    lanes = store.lanes if items == 1 else 1  # of an item
    group = heads // (items * lanes)  # query heads of a lane
    unit = 1 if store.key_scales is None else group_size(8 // store.packing)
    block = min(largest, store.slots)
    first_lane = jax.lax.iota(jnp.int32, items) * store.lanes // items
    q = query.reshape(batch, n, items, lanes, group, head_dim).transpose(0, 2, 3, 1, 4, 5)
    q = q.reshape(batch, items, lanes, n * group, head_dim)
    ends = offsets + lengths
    hidden = jnp.repeat(n - 1 - jax.lax.iota(jnp.int32, n), group) if causal else jnp.zeros(1, jnp.int32)
    last_seen = ends[..., None] - hidden[None, None]  # [batch, items, rows or 1]

    def load(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [batch, items, lanes, block, head_dim] from the slots `start` [batch, items]."""

        def cut(x: jax.Array, axis: int, divisor: int) -> jax.Array:
            sizes = [lanes, *x.shape[2:]]
            sizes[axis - 1] = block // divisor

            def one(row: jax.Array, lane: jax.Array, first: jax.Array) -> jax.Array:
                where = [lane, *[jnp.int32(0)] * (row.ndim - 1)]
                where[axis - 1] = first // divisor
                return jax.lax.dynamic_slice(row, where, sizes)

            return jax.vmap(jax.vmap(one, (None, 0, 0)))(x, jnp.broadcast_to(first_lane, start.shape), start)

        keys, values = (cut(x, 2, store.packing) for x in (store.keys, store.values))
        if store.key_scales is None or store.value_scales is None:
            return keys, values
        bits = 8 // store.packing
        keys = dequantise_keys(keys, cut(store.key_scales, 2, unit), bits)
        values = dequantise_values(values, cut(store.value_scales, 3, 1), bits)
        return keys.astype(query.dtype), values.astype(query.dtype)

    base = offsets // unit * unit

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest, total, out = state
        wanted = base + i * block
        start = jnp.minimum(wanted, store.slots - block)  # the last block of the store is shifted back to fit
        slot = (start[..., None] + jax.lax.iota(jnp.int32, block)[None, None])[:, :, None]  # [batch, items, 1, block]
        after = slot >= jnp.maximum(wanted, offsets)[..., None, None]
        inside = after & (slot < ends[..., None, None])
        seen = (after & (slot < last_seen[..., None]))[:, :, None]  # [batch, items, 1, rows or 1, block]
        if segments.skip is not None:
            seen &= (slot >= (offsets[..., None] + jnp.repeat(segments.skip, group, axis=1)[:, None])[..., None])[
                :, :, None
            ]
        k, v = load(start)
        v = jnp.where(inside[..., None], v, 0)  # 0 * NaN would be NaN
        logits = scale * jnp.einsum("bilrd,bilsd->bilrs", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(seen, logits, _MASKED)
        new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1))
        weights = jnp.where(seen, jnp.exp(logits - new_highest[..., None]), 0)
        decay = jnp.exp(highest - new_highest)
        part = jnp.einsum("bilrs,bilsd->bilrd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new_highest, total * decay + jnp.sum(weights, axis=-1), out * decay[..., None] + part

    zeros = jnp.zeros(q.shape, jnp.float32)
    state = (jnp.full(q.shape[:-1], _MASKED, jnp.float32), zeros[..., 0], zeros)
    blocks = (jnp.max(ends - base) + block - 1) // block
    highest, total, out = jax.lax.fori_loop(0, blocks, step, varying(state, query, store, segments))
    empty = total == 0
    out = out / jnp.where(empty, 1, total)[..., None]
    lse = jnp.where(empty, -jnp.inf, highest + jnp.log(jnp.where(empty, 1, total)))

    def per_row(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, items, lanes, n, group, -1).transpose(0, 3, 1, 2, 4, 5)
        return x.reshape(batch, n, heads, -1)

    return per_row(out), per_row(lse)[..., 0]
