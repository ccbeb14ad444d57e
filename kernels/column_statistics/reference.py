"""The definition, written from the formula in float32. Materialises length x length."""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.column_statistics.types import ColumnStatistics


def column_statistics(
    query: jax.Array, key: jax.Array, first: jax.Array, count: jax.Array, log_threshold: float, scale: float
) -> ColumnStatistics:
    """See `api.column_statistics`."""
    length, group = query.shape[1], query.shape[2] // key.shape[2]
    k = jnp.repeat(key.astype(jnp.float32), group, axis=2)
    logits = scale * jnp.einsum("bthd,bshd->bhts", query.astype(jnp.float32), k, precision="highest")
    causal = jnp.tril(jnp.ones((length, length), bool))
    attention = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf), axis=-1)
    row = jnp.arange(length)
    chosen = (row >= first[:, None]) & (row < (first + count)[:, None])  # [batch, length]
    chosen = chosen[:, None, :, None]
    large = attention >= jnp.exp(log_threshold) * jnp.max(attention, axis=-1, keepdims=True)
    counts = jnp.sum(large & causal & chosen, axis=(2, 3)).astype(jnp.float32)
    return ColumnStatistics(jnp.sum(jnp.where(chosen, attention, 0), axis=2), counts)
