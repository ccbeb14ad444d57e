"""A loop over blocks of slots in plain XLA, as many as the longest segment needs."""

import jax
import jax.numpy as jnp

_SMALLEST, _LARGEST = 32, 512  # slots read at once
_BLOCKS = 8  # of the store
_SINGLE = 128  # segments that cannot be longer are read at once, without a loop

_MASKED = float(jnp.finfo(jnp.float32).min)
_LOWEST = _MASKED / 2  # exp(_MASKED - _LOWEST) = 0: a block without slots needs no second mask


def block_size(slots: int) -> int:
    """Slots read at once: a share of the store, since short segments come in small stores, in which each
    layer has its part; large blocks save iterations where segments are long."""
    share = slots // _BLOCKS // 16 * 16
    return min(slots, max(_SMALLEST, min(_LARGEST, share)))


def decode_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    offsets: jax.Array,
    lengths: jax.Array,
    scale: float,
    max_length: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_attention`.

    The heads of an item share their segment: all heads of a row if `offsets` is [batch, 1], else one KV head.
    """
    batch, heads, head_dim = query.shape
    lanes, slots = keys.shape[1:3]
    items = offsets.shape[1]  # items of a row
    heads_per_item = heads // items if items > 1 else heads // lanes
    bound = slots if max_length is None else min(max_length, slots)
    block = bound if bound <= _SINGLE else block_size(slots)
    lanes_per_item = lanes if items == 1 else 1
    lane = jnp.arange(items) * lanes // items
    # [batch, items, lanes of the item, query heads of the lane, head_dim]
    q = query.reshape(batch, items, lanes_per_item, heads_per_item, head_dim)
    ends = offsets + lengths

    def slice_block(store: jax.Array, start: jax.Array) -> jax.Array:  # start [batch or 1, items]
        if offsets.shape == (1, 1):  # one slice instead of a gather
            where = (0, 0, start[0, 0], 0)
            return jax.lax.dynamic_slice(store, where, (batch, lanes, block, head_dim))[:, None]

        def one(row, lane, first):
            return jax.lax.dynamic_slice(row, (lane, first, 0), (lanes_per_item, block, head_dim))

        return jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, 0))(store, lane, start)

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest, total, out = state
        wanted = offsets + i * block
        start = jnp.clip(wanted, 0, slots - block)  # the last block of the store is shifted back to fit
        slot = start[..., None] + jnp.arange(block)
        inside = ((slot >= wanted[..., None]) & (slot < ends[..., None]))[:, :, None, None]
        k, v = slice_block(keys, start), slice_block(values, start)
        v = jnp.where(inside.swapaxes(3, 4), v, 0)  # 0 * NaN would be NaN
        logits = scale * jnp.einsum("bilhd,bilsd->bilhs", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(inside, logits, _MASKED)
        new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - new_highest[..., None])
        decay = jnp.exp(highest - new_highest)
        part = jnp.einsum("bilhs,bilsd->bilhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new_highest, total * decay + jnp.sum(weights, -1), out * decay[..., None] + part

    start = (
        jnp.full(q.shape[:-1], _LOWEST, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    if block >= bound:
        highest, total, out = step(jnp.int32(0), start)
    else:
        blocks = (jnp.max(lengths) + block - 1) // block
        highest, total, out = jax.lax.fori_loop(0, blocks, step, start)
    empty = total == 0
    out = out / jnp.where(empty, 1, total)[..., None]
    lse = jnp.where(empty, -jnp.inf, highest + jnp.log(jnp.where(empty, 1, total)))
    return out.reshape(batch, heads, head_dim), lse.reshape(batch, heads)
