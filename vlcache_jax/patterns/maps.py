"""Parts of block maps: diagonals, means of blocks, and the largest numbers up to a sum."""

import jax
import jax.numpy as jnp

from vlcache_jax.cache.selection import as_unsigned, highest


def united(x: jax.Array, list_heads: int) -> jax.Array:
    """[batch, heads, ...] -> [batch, list heads or 1, ...]: what any of the heads wants, or the largest number."""
    if x.shape[1] in (1, list_heads):
        return x
    if x.shape[1] < list_heads:  # a pattern of KV heads, lists of query heads
        return jnp.repeat(x, list_heads // x.shape[1], axis=1)
    x = x.reshape(x.shape[0], list_heads, -1, *x.shape[2:])
    return jnp.any(x, axis=2) if x.dtype == bool else jnp.max(x, axis=2)


def diagonals(chosen: jax.Array) -> jax.Array:
    """bool [..., blocks, blocks] from bool [..., blocks]: whether the diagonal at each distance is chosen.

    Entry (r, c) is that of distance r - c; False above the main diagonal.

    Example:
      >>> diagonals(jnp.array([True, False, True])).astype(int).tolist()
      [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    """
    n, lead = chosen.shape[-1], chosen.shape[:-1]
    # One period of a row that moves on by one from row to row: [d0, none x n, d(n-1) ... d1]. No gather is needed.
    period = jnp.concatenate([chosen[..., :1], jnp.zeros((*lead, n), bool), chosen[..., :0:-1]], axis=-1)
    return sheared(jnp.broadcast_to(period[..., None, :], (*lead, n, 2 * n)))[..., :n]


def sheared(x: jax.Array) -> jax.Array:
    """[..., rows, columns], row i moved by i to the right, round the end: a bit of i at a time, by copies alone.

    Example:
      >>> sheared(jnp.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]])).tolist()
      [[1, 2, 3], [3, 1, 2], [2, 3, 1]]
    """
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2)
    for bit in range((x.shape[-2] - 1).bit_length()):
        x = jnp.where((row >> bit) & 1 == 1, jnp.roll(x, 1 << bit, axis=-1), x)
    return x


def blocks_of_offsets(chosen: jax.Array, block: int) -> jax.Array:
    """bool [..., blocks, blocks]: blocks of keys that hold, for any query of a block, a key at a chosen distance.

    Args:
      chosen: bool [..., length], of each distance from 0 on.
      block: queries, and keys, of a block.
    """
    length = chosen.shape[-1]
    parts = jnp.pad(chosen, [(0, 0)] * (chosen.ndim - 1) + [(0, -length % block)])
    parts = parts.reshape(*chosen.shape[:-1], -1, block)
    # Distance block * m + e reaches the block m before, and from its first queries, where e > 0, one further.
    here, further = jnp.any(parts, axis=-1), jnp.any(parts[..., 1:], axis=-1)
    further = jnp.concatenate([jnp.zeros_like(further[..., :1]), further[..., :-1]], axis=-1)
    return diagonals(here | further)


def block_means(x: jax.Array, lengths: jax.Array, block: int, *, true_counts: bool) -> jax.Array:
    """f32 [batch, blocks, heads, d]: means of the tokens of each block of x [batch, length, heads, d].

    Padding counts as zeros, or not at all with `true_counts`; a block of padding alone is zero.
    """
    batch, length, *rest = x.shape
    inside = jax.lax.iota(jnp.int32, length)[None] < lengths[:, None]
    x = jnp.where(inside[..., None, None], x.astype(jnp.float32), 0)
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0))).reshape(batch, -1, block, *rest)
    if not true_counts:
        return jnp.mean(x, axis=2)
    start = block * jax.lax.iota(jnp.int32, x.shape[1])[None]
    count = jnp.clip(lengths[:, None] - start, 1, block).astype(jnp.float32)
    return jnp.sum(x, axis=2) / count[..., None, None]


def largest_reaching(values: jax.Array, wanted: jax.Array) -> jax.Array:
    """Marks the fewest largest values of the last axis whose sum is at least `wanted` [..., 1]; none where that is 0.

    The values are not negative. Equal ones are marked together. All are marked where even their sum is less.
    """
    numbers = as_unsigned(values)
    shape = (*values.shape[:-1], 1)
    threshold = highest(lambda t: jnp.sum(jnp.where(numbers >= t, values, 0), -1, keepdims=True) >= wanted, shape)
    return numbers >= threshold


def largest_within(values: jax.Array, wanted: jax.Array) -> jax.Array:
    """Marks the largest values of the last axis, as many as have a sum of `wanted` [..., 1] at most.

    The values are not negative. Equal ones are marked together, or left out.
    """
    numbers = as_unsigned(values)
    shape = (*values.shape[:-1], 1)
    threshold = highest(lambda t: jnp.sum(jnp.where(numbers >= t, values, 0), -1, keepdims=True) > wanted, shape)
    return numbers > threshold
