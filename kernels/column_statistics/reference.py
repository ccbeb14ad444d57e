"""The definition, written from the formula in float32. Materialises rows x length."""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.column_statistics.types import ColumnStatistics, Options, Rows


def column_statistics(
    options: Options, query: jax.Array, key: jax.Array, rows: Rows, lse: jax.Array | None, maximum: jax.Array | None
) -> ColumnStatistics:
    """See `api.column_statistics`. Recomputes the log-sum-exp and the maximum if they are given, too."""
    group = query.shape[2] // key.shape[2]
    k = jnp.repeat(key.astype(jnp.float32), group, axis=2)
    logits = options.scale * jnp.einsum("bthd,bshd->bhts", query.astype(jnp.float32), k, precision="highest")
    index, column = jax.lax.iota(jnp.int32, query.shape[1])[None], jax.lax.iota(jnp.int32, key.shape[1])
    last = rows.start[:, None] + index if rows.last is None else rows.last  # [batch, rows]
    chosen = (index >= rows.low[:, None]) & (index < rows.high[:, None])
    visible = ((column[None, None] <= last[..., None]) & chosen[..., None])[:, None]  # [batch, 1, rows, columns]
    logits = jnp.where(visible, logits, -jnp.inf)
    attention = jnp.where(visible, jax.nn.softmax(logits, axis=-1), 0)
    large = attention >= jnp.exp(options.log_threshold or 0.0) * jnp.max(attention, axis=-1, keepdims=True)
    return ColumnStatistics(
        sums=jnp.sum(attention, axis=2),
        counts=None if options.log_threshold is None else jnp.sum(large & visible, axis=(2, 3)).astype(jnp.float32),
        lse=jax.scipy.special.logsumexp(logits, axis=-1).swapaxes(1, 2),
        maximum=jnp.max(logits, axis=-1).swapaxes(1, 2),
        column_maximum=jnp.max(attention, axis=2) if options.column_maximum else None,
    )
