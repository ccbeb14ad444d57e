"""What a prompt's last rows attend to: from them patterns guess what the others do."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.column_statistics import ColumnStatistics
from vlcache_jax.patterns.maps import sheared


@dataclasses.dataclass(frozen=True)
class LastRowsAttention:
    """Of every query head, with all keys that the rows see.

    Attributes:
      probabilities: f32 [batch, heads, rows, length]; 0 behind a row, and in rows that a short prompt does not have.
      first: i32 [batch], the prompt row of the first one.
      count: i32 [batch], how many rows there are.
      logits: f32 like the probabilities, the scaled products.
      seen: bool [batch, 1, rows, length], which of them count.
    """

    probabilities: jax.Array
    first: jax.Array
    count: jax.Array
    logits: jax.Array
    seen: jax.Array

    @property
    def vertical(self) -> jax.Array:
        """f32 [batch, heads, length]: the sum over the rows, of each key."""
        return jnp.sum(self.probabilities, axis=2)

    def statistics(self, threshold: float | None) -> ColumnStatistics:
        """What `kernels.column_statistics` says of the same rows, but for row statistics [batch, heads, rows]."""
        logits = jnp.where(self.seen, self.logits, -jnp.inf)
        maximum = jnp.max(logits, axis=3)
        counts = None
        if threshold is not None:
            top = jnp.where(maximum == -jnp.inf, 0, maximum)[..., None]  # of rows that are none
            large = self.seen & (logits - top >= math.log(threshold))
            counts = jnp.sum(large, axis=(2, 3)).astype(jnp.float32)
        lse = jax.scipy.special.logsumexp(logits, axis=3)
        return ColumnStatistics(self.vertical, counts, lse, maximum)

    @property
    def slash(self) -> jax.Array:
        """f32 [batch, heads, length]: the sum over the rows of what lies so many tokens before each.

        [.., o] = sum over rows t of the attention of row t to key t - o.
        """
        rows, length = self.probabilities.shape[2:]
        # Row i turned round and moved i to the right: each distance is a column then.
        turned = jnp.pad(self.probabilities[..., ::-1], [(0, 0)] * 3 + [(0, rows - 1)])
        sums = jnp.sum(sheared(turned), axis=2)
        sums = jnp.pad(sums, ((0, 0), (0, 0), (0, length)))

        def of_row(sums: jax.Array, first: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(sums, length - 1 - first, length, axis=-1)

        return jax.vmap(of_row)(sums, self.first)


def last_rows_attention(query: jax.Array, key: jax.Array, lengths: jax.Array, rows: int) -> LastRowsAttention:
    """The causal attention of each prompt's last `rows` rows, softmax in float32.

    Args:
      query: [batch, length, heads, head_dim].
      key: [batch, length, kv_heads, head_dim].
      lengths: i32 [batch].
      rows: how many; a shorter prompt has all of its rows.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    first = jnp.maximum(lengths - rows, 0)
    row = first[:, None] + jax.lax.iota(jnp.int32, rows)[None]
    some = jnp.take_along_axis(query, jnp.minimum(row, length - 1)[..., None, None], axis=1)
    some = some.reshape(batch, rows, kv_heads, heads // kv_heads, head_dim)
    logits = jnp.einsum("brkgd,bskd->bkgrs", some, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    logits = logits.reshape(batch, heads, rows, length)
    there = (row < lengths[:, None])[..., None]
    seen = ((jax.lax.iota(jnp.int32, length)[None, None] <= row[..., None]) & there)[:, None]
    logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0)
    return LastRowsAttention(weights, first, jnp.minimum(lengths, rows), logits, seen)
