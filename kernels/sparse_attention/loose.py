"""Single columns besides the listed blocks: gathered once for each list head, and merged by log-sum-exp."""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.chunks import in_chunks
from vlcache_jax.kernels.merge import merge
from vlcache_jax.kernels.sparse_attention.types import Lists, Options

_LOGITS = 2**28  # bytes of the logits that exist at once
_LOWEST = float(jnp.finfo(jnp.float32).min)


def with_loose(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lists: Lists,
    out: jax.Array,
    lse: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What the listed blocks gave, f32 [batch, length, heads, d] and [batch, length, heads], with the loose columns."""
    if lists.loose is None:
        return out, lse
    batch, length, heads, head_dim = query.shape
    list_heads, n = lists.loose.shape[1:]
    # [batch, list heads, n, d]: what is not there may be NaN where it is read instead
    columns = lists.loose
    there = columns < length
    at = jnp.where(there, columns, 0)[..., None]

    def gathered(x: jax.Array) -> jax.Array:
        x = x.swapaxes(1, 2)
        x = jnp.repeat(x, list_heads // x.shape[1], axis=1) if list_heads > x.shape[1] else x
        return jnp.where(there[..., None], jnp.take_along_axis(x, at, axis=2, mode="clip"), 0)

    k, v = gathered(key), gathered(value)
    hidden = _in_listed_blocks(lists, columns, length)  # [batch, list heads, blocks, n]
    q = query.reshape(batch, length, list_heads, heads // list_heads, head_dim)

    def some(q, first):  # [batch, rows, list heads, group, d]
        row = first + jax.lax.iota(jnp.int32, q.shape[1])
        block = jnp.minimum(row // lists.rows, hidden.shape[2] - 1)
        row = row[None, None, :, None]
        seen = (columns[:, :, None] <= row) & there[:, :, None] & ~jnp.take(hidden, block, axis=2)
        if options.window is not None:
            seen &= columns[:, :, None] > row - options.window
        seen = seen[:, :, None]  # [batch, list heads, 1, rows, n]
        logits = options.scale * jnp.einsum("btlgd,blnd->blgtn", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(seen, logits, _LOWEST)
        highest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.where(seen, jnp.exp(logits - highest), 0)
        total = jnp.sum(weights, axis=-1)
        safe = jnp.where(total == 0, 1, total)
        part = jnp.einsum("blgtn,blnd->btlgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        lse = jnp.where(total == 0, -jnp.inf, highest[..., 0] + jnp.log(safe))
        return part / safe.transpose(0, 3, 1, 2)[..., None], lse.transpose(0, 3, 1, 2)

    chunk = max(8, _LOGITS // (4 * batch * heads * n) // 8 * 8)
    loose_out, loose_lse = in_chunks(some, q, chunk)
    return merge([(out, lse), (loose_out.reshape(out.shape), loose_lse.reshape(lse.shape))])


def _in_listed_blocks(lists: Lists, columns: jax.Array, length: int) -> jax.Array:
    """bool [batch, list heads, blocks, n]: whether a list names the block of a column, or is that of padding."""
    blocks = -(-length // lists.columns)
    there = jax.lax.iota(jnp.int32, lists.ids.shape[3])[None, None, None] < lists.counts[..., None]
    ids = jnp.where(there, lists.ids, blocks)
    batch, list_heads, rows, _ = ids.shape
    named = jnp.zeros((batch * list_heads * rows, blocks + 1), bool)
    flat = ids.reshape(len(named), -1)
    named = named.at[jax.lax.iota(jnp.int32, len(named))[:, None], flat].set(True, mode="drop")
    named = named.reshape(batch, list_heads, rows, blocks + 1)
    block = jnp.minimum(columns // lists.columns, blocks)
    found = jnp.take_along_axis(named, block[:, :, None], axis=3)
    return found | (lists.counts == 0)[..., None]
