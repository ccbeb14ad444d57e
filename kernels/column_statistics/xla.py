"""A loop over blocks of rows in plain XLA, as many as the slice needs.

A block holds whole rows, so their maximum and log-sum-exp come out on the way and one product with the keys is enough.
"""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.column_statistics.types import ColumnStatistics, Options, Rows, spread
from vlcache_jax.kernels.varying import varying

_BLOCK = 64  # query rows whose logits exist at once, for one KV head


def column_statistics(
    options: Options, query: jax.Array, key: jax.Array, rows: Rows, lse: jax.Array | None, maximum: jax.Array | None
) -> ColumnStatistics:
    """See `api.column_statistics`. One (row of the batch, KV head) at a time."""
    batch, size, heads, head_dim = query.shape
    length, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    block = min(_BLOCK, size)
    given = lse is not None
    need_maximum = maximum is None and (not given or options.log_threshold is not None)

    def by_head(x: jax.Array) -> jax.Array:  # [batch, rows, heads, ...] -> [batch * kv_heads, group, rows, ...]
        x = jnp.moveaxis(x.reshape(batch, size, kv_heads, group, *x.shape[3:]), 1, 3)
        return x.reshape(batch * kv_heads, group, size, *x.shape[4:])

    nothing = jnp.full((batch, size, heads), -jnp.inf, jnp.float32)
    q = by_head(query)
    k = key.swapaxes(1, 2).reshape(batch * kv_heads, length, head_dim)
    row_lse, row_maximum = (by_head(nothing if x is None else x.astype(jnp.float32)) for x in (lse, maximum))
    column = jax.lax.iota(jnp.int32, length)[None]
    lowest = jnp.finfo(jnp.float32).min

    def one_head(item):
        q, k, row_lse, row_maximum, rows = item  # [group, rows, d], [length, d], 2 x [group, rows], Rows of one
        start, low, high, last = rows

        def step(i, state):
            wanted = low + i * block
            at = jnp.minimum(wanted, size - block)  # the last block is shifted back to fit
            part = jax.lax.dynamic_slice_in_dim(q, at, block, axis=1).reshape(group * block, head_dim)
            logits = options.scale * jnp.matmul(part, k.T, preferred_element_type=jnp.float32)
            index = at + jax.lax.iota(jnp.int32, block)[:, None]
            chosen = ((index >= wanted) & (index < high))[None]  # [1, block, 1]
            seen = start + index if last is None else jax.lax.dynamic_slice_in_dim(last, at, block)[:, None]
            visible = (column <= seen)[None] & chosen  # the block's other rows may be padding, and hold NaN
            logits = jnp.where(visible, logits.reshape(group, block, length), lowest)
            top = jax.lax.dynamic_slice_in_dim(state["maximum"], at, block, axis=1)[..., None]
            if need_maximum:
                top = jnp.where(chosen, jnp.max(logits, axis=-1, keepdims=True), top)
            if given:
                log_sum = jax.lax.dynamic_slice_in_dim(state["lse"], at, block, axis=1)[..., None]
                weights = jnp.where(visible, jnp.exp(logits - jnp.where(chosen, log_sum, 0)), 0)
            else:
                highest = top if need_maximum else jnp.max(logits, axis=-1, keepdims=True)
                weights = jnp.exp(logits - jnp.where(chosen, highest, 0))
                total = jnp.sum(weights, axis=-1, keepdims=True)
                weights = weights * jnp.where(chosen, 1 / jnp.where(chosen, total, 1), 0)
                old = jax.lax.dynamic_slice_in_dim(state["lse"], at, block, axis=1)[..., None]
                log_sum = jnp.where(chosen, highest + jnp.log(total), old)
            new = {"sums": state["sums"] + jnp.sum(weights, axis=1)}
            if options.log_threshold is not None:
                large = jnp.sum((logits - top >= options.log_threshold) & visible, axis=(1, 2))
                new["counts"] = state["counts"] + large.astype(jnp.float32)
            if options.column_maximum:
                new["column_maximum"] = jnp.maximum(state["column_maximum"], jnp.max(weights, axis=1))
            for name, value in (("lse", log_sum), ("maximum", top)):
                new[name] = jax.lax.dynamic_update_slice_in_dim(state[name], value[..., 0], at, axis=1)
            return new

        zero = jnp.zeros((group, length), jnp.float32)
        state = {"sums": zero, "lse": row_lse, "maximum": row_maximum}
        if options.log_threshold is not None:
            state["counts"] = zero[:, 0]
        if options.column_maximum:
            state["column_maximum"] = zero
        state = varying(state, item)
        return jax.lax.fori_loop(0, (high - low + block - 1) // block, step, state)

    of_heads = jax.tree.map(lambda x: jnp.repeat(x, kv_heads, axis=0), rows)
    state = jax.lax.map(one_head, (q, k, row_lse, row_maximum, of_heads))

    def by_row(x: jax.Array) -> jax.Array:  # [batch * kv_heads, group, rows] -> [batch, rows, heads]
        return spread(rows, x.reshape(batch, heads, size).swapaxes(1, 2))

    return ColumnStatistics(
        sums=state["sums"].reshape(batch, heads, length),
        counts=state["counts"].reshape(batch, heads) if "counts" in state else None,
        lse=by_row(state["lse"]),
        maximum=by_row(state["maximum"]) if need_maximum or maximum is not None else None,
        column_maximum=state["column_maximum"].reshape(batch, heads, length) if options.column_maximum else None,
    )
