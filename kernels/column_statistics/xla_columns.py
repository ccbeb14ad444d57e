"""Plain XLA for GPUs: blocks of columns, all heads and rows of a block at once.

A block of logits is small enough to stay in the L2 cache of a large GPU. Without the rows' log-sum-exp (or maximum,
where entries are counted) a first pass over the blocks computes it.
"""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.column_statistics.types import ColumnStatistics, Options, Rows, spread
from vlcache_jax.kernels.varying import varying

_ROWS = 128  # rows of a block
_COLUMNS = 4096  # columns of a block


def column_statistics(
    options: Options, query: jax.Array, key: jax.Array, rows: Rows, lse: jax.Array | None, maximum: jax.Array | None
) -> ColumnStatistics:
    """See `api.column_statistics`."""
    batch, size, heads = query.shape[:3]
    length, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    height, width = min(_ROWS, size), min(_COLUMNS, length)
    need_lse = lse is None
    need_maximum = maximum is None and (need_lse or options.log_threshold is not None)
    lowest = jnp.finfo(jnp.float32).min

    def by_head(x: jax.Array) -> jax.Array:  # [batch, rows, heads, ...] -> [batch, kv_heads, group, rows, ...]
        return jnp.moveaxis(x.reshape(batch, size, kv_heads, group, *x.shape[3:]), 1, 3)

    nothing = jnp.full((batch, size, heads), -jnp.inf, jnp.float32)
    q, k = by_head(query), key.swapaxes(1, 2)  # [batch, kv_heads, length, d]
    start, low, high = (x[:, None, None, None, None] for x in rows[:3])

    def rows_from(at, wanted, state):
        """Adds the rows wanted .. at + height - 1; at <= wanted where the last block is shifted back to fit."""
        part = jax.lax.dynamic_slice_in_dim(q, at, height, axis=3)
        index = at + jax.lax.iota(jnp.int32, height)[None, None, None, :, None]
        chosen = (index >= jnp.maximum(wanted, low)) & (index < high)  # [batch, 1, 1, height, 1]
        blocks: jax.Array | int = -(-length // width)
        seen = start + index
        if rows.last is not None:
            seen = jax.lax.dynamic_slice_in_dim(rows.last, at, height, axis=1)[:, None, None, :, None]
        elif size > height:  # no block beyond the last row's own column; one block of rows has a static number
            last = jnp.max(start + jnp.minimum(high, at + height))
            blocks = jnp.clip((last + width - 1) // width, 0, blocks)

        def block(i):
            left = jnp.minimum(i * width, length - width)
            keys = jax.lax.dynamic_slice_in_dim(k, left, width, axis=2)
            logits = options.scale * jnp.einsum("bngrd,bnsd->bngrs", part, keys, preferred_element_type=jnp.float32)
            column = left + jax.lax.iota(jnp.int32, width)[None, None, None, None]
            visible = (column >= i * width) & (column <= seen) & chosen
            return left, jnp.where(visible, logits, lowest), visible

        top, log_sum = (jax.lax.dynamic_slice_in_dim(state[x], at, height, axis=3) for x in ("maximum", "lse"))
        if need_lse or need_maximum:

            def measure(i, carry):
                highest, total = carry
                _, logits, _ = block(i)
                new = jnp.maximum(highest, jnp.max(logits, axis=-1))
                if need_lse:
                    total = total * jnp.exp(highest - new) + jnp.sum(jnp.exp(logits - new[..., None]), axis=-1)
                return new, total

            zero = jnp.zeros(top.shape, jnp.float32)
            highest, total = jax.lax.fori_loop(0, blocks, measure, varying((zero + lowest, zero), q, k, rows))
            inside = chosen[..., 0]
            if need_maximum:
                top = jnp.where(inside, highest, top)
            if need_lse:
                log_sum = jnp.where(inside, highest + jnp.log(jnp.where(inside, total, 1)), log_sum)
        shift = jnp.where(chosen, log_sum[..., None], 0)

        def add(i, sums):
            left, logits, visible = block(i)
            weights = jnp.where(visible, jnp.exp(logits - shift), 0)
            new = dict(sums)
            old = jax.lax.dynamic_slice_in_dim(sums["sums"], left, width, axis=3)
            new["sums"] = jax.lax.dynamic_update_slice_in_dim(
                sums["sums"], old + jnp.sum(weights, axis=3), left, axis=3
            )
            if options.log_threshold is not None:
                large = (logits - top[..., None] >= options.log_threshold) & visible
                new["counts"] = sums["counts"] + jnp.sum(large, axis=(3, 4)).astype(jnp.float32)
            if options.column_maximum:
                old = jax.lax.dynamic_slice_in_dim(sums["column_maximum"], left, width, axis=3)
                new["column_maximum"] = jax.lax.dynamic_update_slice_in_dim(
                    sums["column_maximum"], jnp.maximum(old, jnp.max(weights, axis=3)), left, axis=3
                )
            return new

        new = jax.lax.fori_loop(0, blocks, add, {n: x for n, x in state.items() if n not in ("lse", "maximum")})
        for name, value in (("lse", log_sum), ("maximum", top)):
            new[name] = jax.lax.dynamic_update_slice_in_dim(state[name], value, at, axis=3)
        return new

    zero = jnp.zeros((batch, kv_heads, group, length), jnp.float32)
    state = {"sums": zero}
    state["lse"], state["maximum"] = (by_head(nothing if x is None else x.astype(jnp.float32)) for x in (lse, maximum))
    if options.log_threshold is not None:
        state["counts"] = zero[..., 0]
    if options.column_maximum:
        state["column_maximum"] = zero
    state = varying(state, q, k, rows, lse, maximum)
    if size == height:
        state = rows_from(0, 0, state)
    else:
        state = jax.lax.fori_loop(
            jnp.min(rows.low) // height,
            (jnp.max(rows.high) + height - 1) // height,
            lambda i, state: rows_from(jnp.minimum(i * height, size - height), i * height, state),
            state,
        )

    def by_row(x: jax.Array) -> jax.Array:  # [batch, kv_heads, group, rows] -> [batch, rows, heads]
        return spread(rows, x.reshape(batch, heads, size).swapaxes(1, 2))

    return ColumnStatistics(
        sums=state["sums"].reshape(batch, heads, length),
        counts=state["counts"].reshape(batch, heads) if "counts" in state else None,
        lse=by_row(state["lse"]),
        maximum=by_row(state["maximum"]) if need_maximum or maximum is not None else None,
        column_maximum=state["column_maximum"].reshape(batch, heads, length) if options.column_maximum else None,
    )
