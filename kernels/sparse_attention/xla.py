"""Plain XLA: a loop over the listed blocks of keys, `_AT_ONCE` of them a step, with a running softmax.

    block of queries i      ids | 0 | 3 | 7 | 8 | 9 | . . .      as many steps as the count asks for
                                 step 0         step 1

`sparse_attention` runs one (row of the batch, list head) after the other, which is fast on CPUs: the work is that of
the listed blocks. `wide` runs all of them at once, for accelerators: a step is one batch of products, and a block
of queries takes as many steps as its longest list. So it does more work where lists of one
block of queries differ in length.
"""

from functools import partial

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.sparse_attention.loose import with_loose
from vlcache_jax.kernels.sparse_attention.types import Lists, Options
from vlcache_jax.kernels.varying import varying

_AT_ONCE = 4  # blocks of keys a step
_LOWEST = float(jnp.finfo(jnp.float32).min)


def sparse_attention(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lists: Lists,
    *,
    wide: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.sparse_attention`."""
    batch, length, heads, head_dim = query.shape
    kv_heads, (list_heads, blocks, capacity) = key.shape[2], lists.ids.shape[1:]
    group, sharing = heads // list_heads, list_heads // kv_heads
    steps = -(-capacity // _AT_ONCE)
    ids = jnp.pad(lists.ids, ((0, 0), (0, 0), (0, 0), (0, steps * _AT_ONCE - capacity)))

    def padded(x: jax.Array, size: int) -> jax.Array:  # [batch, length, ...]
        return jnp.pad(x, ((0, 0), (0, -length % size), *[(0, 0)] * (x.ndim - 2)))

    q = padded(query, lists.rows).reshape(batch, blocks, lists.rows, list_heads, group, head_dim)
    q = q.transpose(0, 3, 1, 4, 2, 5)  # [batch, list heads, blocks, group, rows, d]
    k, v = (padded(x, lists.columns).swapaxes(1, 2) for x in (key, value))
    k, v = (x.reshape(batch, kv_heads, -1, lists.columns, head_dim) for x in (k, v))
    one_block = partial(_one_block, options, lists.rows)
    number = jax.lax.iota(jnp.int32, blocks)
    limits = places = None  # i32 [batch, list heads, blocks, rows or columns]
    if lists.order is not None:  # what is padded is seen by none, and sees none

        def in_blocks(x: jax.Array, size: int, filler: int) -> jax.Array:
            x = jnp.pad(x, ((0, 0), (0, 0), (0, -length % size)), constant_values=filler)
            return x.reshape(batch, list_heads, -1, size)

        places = in_blocks(lists.order.places, lists.columns, jnp.iinfo(jnp.int32).max)
        limits = in_blocks(lists.order.limits, lists.rows, 0)

    if wide:
        k, v = (jnp.repeat(x, sharing, axis=1) if sharing > 1 else x for x in (k, v))
        axes = (0, 0, 0, 0, 0, None, None, 0, 0)
        every = jax.vmap(jax.vmap(one_block, axes), axes)

        def of_block(item):
            (q, ids, counts, limits), i = item
            most = jnp.max(-(-counts // _AT_ONCE))
            return every(q, k, v, ids, counts, most, i, places, limits)

        of_blocks = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (q, ids, lists.counts, limits))
        out, lse = jax.lax.map(of_block, (of_blocks, number))
        out, lse = jnp.moveaxis(out, 0, 2), jnp.moveaxis(lse, 0, 2)
    else:

        def of_head(item):
            of_blocks, places, head = item
            k_head, v_head = (x.reshape(-1, *x.shape[2:])[head] for x in (k, v))

            def of_block(item):
                (q, ids, count, limits), i = item
                return one_block(q, k_head, v_head, ids, count, -(-count // _AT_ONCE), i, places, limits)

            return jax.lax.map(of_block, (of_blocks, number))

        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), ((q, ids, lists.counts, limits), places))
        which = jax.lax.iota(jnp.int32, batch * list_heads) // sharing
        out, lse = jax.lax.map(of_head, (*flat, which))
    out = out.reshape(batch, list_heads, blocks, group, lists.rows, head_dim).transpose(0, 2, 4, 1, 3, 5)
    lse = lse.reshape(batch, list_heads, blocks, group, lists.rows).transpose(0, 2, 4, 1, 3)
    out = out.reshape(batch, -1, heads, head_dim)[:, :length]
    lse = lse.reshape(batch, -1, heads)[:, :length]
    out, lse = with_loose(options, query, key, value, lists, out, lse)
    return out.astype(value.dtype), lse


def _one_block(options, rows, q, k, v, ids, count, steps, i, places, limits):
    """(out f32 [group, rows, d], lse [group, rows]) of the queries q [group, rows, d] of block number i.

    k and v are [blocks, columns, d]; `steps` is at least what `count` needs. `places` [blocks, columns] and `limits`
    [rows] are None where tokens lie in the order of the prompt.
    """
    group, _, head_dim = q.shape
    columns = k.shape[1]
    flat = q.reshape(group * rows, head_dim)
    row = i * rows + jax.lax.iota(jnp.int32, rows)[:, None]

    def step(t, state):
        highest, total, out = state
        entry = t * _AT_ONCE + jax.lax.iota(jnp.int32, _AT_ONCE)
        chosen = jnp.where(entry < count, jax.lax.dynamic_slice_in_dim(ids, t * _AT_ONCE, _AT_ONCE), ids[0])
        some_k, some_v = (jnp.take(x, chosen, axis=0, mode="clip").reshape(-1, head_dim) for x in (k, v))
        there = jnp.repeat(entry < count, columns)[None]
        if places is None:
            column = (chosen[:, None] * columns + jax.lax.iota(jnp.int32, columns)[None]).reshape(1, -1)
            seen = (column <= row) & there
        else:
            column = jnp.take(places, chosen, axis=0, mode="clip").reshape(1, -1)
            seen = (column < limits[:, None]) & there
        if options.window is not None:
            seen &= column > row - options.window
        logits = options.scale * jnp.matmul(flat, some_k.T, preferred_element_type=jnp.float32)
        seen = seen[None]
        logits = jnp.where(seen, logits.reshape(group, rows, -1), _LOWEST)
        new = jnp.maximum(highest, jnp.max(logits, axis=-1))
        weights = jnp.where(seen, jnp.exp(logits - new[..., None]), 0)
        decay = jnp.exp(highest - new)
        some = jnp.matmul(weights.reshape(group * rows, -1).astype(v.dtype), some_v, preferred_element_type=jnp.float32)
        out = out * decay[..., None] + some.reshape(group, rows, head_dim)
        return new, total * decay + jnp.sum(weights, axis=-1), out

    none = jnp.zeros((group, rows), jnp.float32)
    start = varying((none + _LOWEST, none, jnp.zeros(q.shape, jnp.float32)), q, k, v, ids, count)
    highest, total, out = jax.lax.fori_loop(0, steps, step, start)
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    out = jnp.where(empty[..., None], 0, out / safe[..., None])  # where nothing is listed, what was read may be NaN
    return out, jnp.where(empty, -jnp.inf, highest + jnp.log(safe))
