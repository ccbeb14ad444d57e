"""A loop over blocks of rows in plain XLA, as many as the slice of the row needs."""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.column_statistics.types import ColumnStatistics

_BLOCK = 64  # query rows whose logits exist at once, for one KV head


def column_statistics(
    query: jax.Array, key: jax.Array, first: jax.Array, count: jax.Array, log_threshold: float, scale: float
) -> ColumnStatistics:
    """See `api.column_statistics`. One (row of the batch, KV head) at a time."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    block = min(_BLOCK, length)
    q = query.reshape(batch, length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch * kv_heads, group, length, head_dim)
    k = key.swapaxes(1, 2).reshape(batch * kv_heads, length, head_dim)
    column = jnp.arange(length)
    lowest = jnp.finfo(jnp.float32).min

    def one_head(item: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, first, count = item  # [group, length, d], [length, d], [], []

        def step(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            sums, counts = state
            wanted = first + i * block
            start = jnp.minimum(wanted, length - block)  # the last block of the prompt is shifted back to fit
            rows = jax.lax.dynamic_slice_in_dim(q, start, block, axis=1).reshape(group * block, head_dim)
            logits = scale * jnp.matmul(rows, k.T, preferred_element_type=jnp.float32)
            row = start + jnp.arange(block)[:, None]
            chosen = (row >= wanted) & (row < first + count)
            visible = (column <= row) & chosen  # the block's other rows may be padding, and hold NaN
            logits = jnp.where(visible, logits.reshape(group, block, length), lowest)
            excess = logits - jnp.max(logits, axis=-1, keepdims=True)
            weights = jnp.exp(excess)
            weights = weights * (chosen / jnp.sum(weights, axis=-1, keepdims=True))
            large = jnp.sum((excess >= log_threshold) & visible, axis=(1, 2))
            return sums + jnp.sum(weights, axis=1), counts + large.astype(jnp.float32)

        zero = (jnp.zeros((group, length), jnp.float32), jnp.zeros((group,), jnp.float32))
        return jax.lax.fori_loop(0, (count + block - 1) // block, step, zero)

    repeat = (jnp.repeat(x, kv_heads) for x in (first, count))
    sums, counts = jax.lax.map(one_head, (q, k, *repeat))
    return ColumnStatistics(sums.reshape(batch, heads, length), counts.reshape(batch, heads))
