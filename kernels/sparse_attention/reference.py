"""The definition, written from the lists in float32. Materialises length x length."""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.attention import Mask
from vlcache_jax.kernels.sparse_attention.types import Lists, Options


def sparse_attention(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, lists: Lists
) -> tuple[jax.Array, jax.Array]:
    """See `api.sparse_attention`."""
    length, heads = query.shape[1:3]
    group = heads // key.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    if lists.order is None:
        allowed = Mask(window=options.window).as_array(length)[:, None]
    else:
        allowed = lists.order.places[:, :, None] < lists.order.limits[..., None]
    seen = _listed(lists, length) & allowed
    seen = jnp.repeat(seen, heads // seen.shape[1], axis=1)
    read = jnp.any(seen, axis=2).swapaxes(1, 2)[..., None]  # others may be NaN
    k, v = jnp.where(read, k, 0), jnp.where(read, v, 0)
    logits = options.scale * jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
    logits = jnp.where(seen, logits, -jnp.inf)
    weights = jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0)  # 0, not NaN, for a row that sees nothing
    out = jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest")
    lse = jax.scipy.special.logsumexp(logits, axis=-1)
    return out.astype(value.dtype), lse.swapaxes(1, 2)


def _listed(lists: Lists, length: int) -> jax.Array:
    """bool [batch, list heads, length, length]: whether a list names the column."""
    ids, counts = lists.ids, lists.counts
    blocks = -(-length // lists.columns)
    there = _index(ids.shape[3], 4) < counts[..., None]
    named = jnp.any((ids[..., None] == _index(blocks, 5)) & there[..., None], axis=3)
    row, column = (jax.lax.iota(jnp.int32, length) // size for size in (lists.rows, lists.columns))
    listed = named[:, :, row][..., column]
    if lists.loose is None:
        return listed
    loose = jnp.any(lists.loose[..., None] == _index(length, 4), axis=2)
    return listed | (loose[:, :, None] & (counts > 0)[:, :, row][..., None])


def _index(size: int, rank: int) -> jax.Array:
    """0, 1, 2 ... along the last of `rank` axes."""
    return jax.lax.iota(jnp.int32, size).reshape(*(1,) * (rank - 1), size)
