"""Plain XLA for GPUs: blocks of columns, all heads and rows of a block at once.

Rows come in blocks, each prompt's from its own first one on. The first block, which is mostly all there is, stands
before the loop over the others: on a GPU the host waits for the condition of every turn of a loop whose number of turns
is data. Without the rows' log-sum-exp (or maximum, where entries are counted) a first pass over the columns computes
it.
"""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.column_statistics.types import ColumnStatistics, Options, Rows, spread
from vlcache_jax.kernels.varying import varying

_ROWS = 128  # rows of a block
_COLUMNS = 4096  # columns of a block, whose logits stay in the L2 cache of a large GPU
_AT_ONCE = 2**29  # bytes of logits up to which all columns are one block: a loop would make the logits twice


def column_statistics(
    options: Options, query: jax.Array, key: jax.Array, rows: Rows, lse: jax.Array | None, maximum: jax.Array | None
) -> ColumnStatistics:
    """See `api.column_statistics`."""
    batch, size, heads = query.shape[:3]
    length, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    height = min(_ROWS, size)
    width = length if 4 * batch * heads * height * length <= _AT_ONCE else min(_COLUMNS, length)
    need_lse = lse is None
    need_maximum = maximum is None and (need_lse or options.log_threshold is not None)
    lowest = jnp.finfo(jnp.float32).min
    k = key.swapaxes(1, 2)  # [batch, kv_heads, length, d]
    arrays = query, k, rows, lse, maximum

    def add_rows(number, columns, state):
        """Adds a block of rows, which see no column of the blocks from `columns` on."""
        index = (rows.low + number * height)[:, None] + jax.lax.iota(jnp.int32, height)[None]  # [batch, height]
        inside = index < rows.high[:, None]
        at = jnp.minimum(index, size - 1)

        def take(x):
            return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)

        def by_head(x):  # [batch, height, heads, ...] -> [batch, kv_heads, group, height, ...]
            return jnp.moveaxis(x.reshape(batch, height, kv_heads, group, *x.shape[3:]), 1, 3)

        def put(name, x):  # [batch, kv_heads, group, height] into [batch, size, heads]
            x = x.reshape(batch, heads, height).swapaxes(1, 2)
            row = jax.lax.iota(jnp.int32, batch)[:, None]
            return state[name].at[row, jnp.where(inside, index, size)].set(x, mode="drop")

        part = by_head(take(query))
        chosen = inside[:, None, None, :, None]
        seen = rows.start[:, None] + index if rows.last is None else take(rows.last)
        seen = seen[:, None, None, :, None]

        def block(i):
            left = jnp.minimum(i * width, length - width)
            keys = jax.lax.dynamic_slice_in_dim(k, left, width, axis=2)
            logits = options.scale * jnp.einsum("bngrd,bnsd->bngrs", part, keys, preferred_element_type=jnp.float32)
            column = left + jax.lax.iota(jnp.int32, width)[None, None, None, None]
            visible = (column >= i * width) & (column <= seen) & chosen
            return left, jnp.where(visible, logits, lowest), visible

        new = dict(state)
        zero = jnp.zeros(part.shape[:-1], jnp.float32)
        top, log_sum = (zero if x is None else by_head(take(x.astype(jnp.float32))) for x in (maximum, lse))
        if need_lse or need_maximum:

            def measure(i, carry):
                highest, total = carry
                _, logits, _ = block(i)
                higher = jnp.maximum(highest, jnp.max(logits, axis=-1))
                if need_lse:
                    total = total * jnp.exp(highest - higher) + jnp.sum(jnp.exp(logits - higher[..., None]), axis=-1)
                return higher, total

            highest, total = jax.lax.fori_loop(0, columns, measure, varying((zero + lowest, zero), *arrays))
            if need_maximum:
                top = highest
                new["maximum"] = put("maximum", top)
            if need_lse:
                log_sum = highest + jnp.log(jnp.where(chosen[..., 0], total, 1))
                new["lse"] = put("lse", log_sum)
        shift = jnp.where(chosen, log_sum[..., None], 0)

        def add(i, sums):
            left, logits, visible = block(i)
            weights = jnp.where(visible, jnp.exp(logits - shift), 0)
            more = dict(sums)
            old = jax.lax.dynamic_slice_in_dim(sums["sums"], left, width, axis=3)
            more["sums"] = jax.lax.dynamic_update_slice_in_dim(
                sums["sums"], old + jnp.sum(weights, axis=3), left, axis=3
            )
            if options.log_threshold is not None:
                large = (logits - top[..., None] >= options.log_threshold) & visible
                more["counts"] = sums["counts"] + jnp.sum(large, axis=(3, 4)).astype(jnp.float32)
            if options.column_maximum:
                old = jax.lax.dynamic_slice_in_dim(sums["column_maximum"], left, width, axis=3)
                more["column_maximum"] = jax.lax.dynamic_update_slice_in_dim(
                    sums["column_maximum"], jnp.maximum(old, jnp.max(weights, axis=3)), left, axis=3
                )
            return more

        of_columns = {n: x for n, x in state.items() if n not in ("lse", "maximum")}
        return new | jax.lax.fori_loop(0, columns, add, of_columns)

    def add_more(number, state):
        """As `add_rows`, of which no block of columns is looked at that lies beyond what the rows see."""
        end = jnp.minimum(rows.low + (number + 1) * height, rows.high)
        columns = -(-length // width)
        if rows.last is not None:
            return add_rows(number, columns, state)
        return add_rows(number, jnp.clip((jnp.max(rows.start + end) + width - 1) // width, 0, columns), state)

    zero = jnp.zeros((batch, kv_heads, group, length), jnp.float32)
    nothing = jnp.full((batch, size, heads), -jnp.inf, jnp.float32)
    state = {"sums": zero}
    if need_lse:
        state["lse"] = nothing
    if need_maximum:
        state["maximum"] = nothing
    if options.log_threshold is not None:
        state["counts"] = zero[..., 0]
    if options.column_maximum:
        state["column_maximum"] = zero
    state = add_rows(0, -(-length // width), varying(state, *arrays))
    if size > height:
        blocks = (jnp.max(rows.high - rows.low) + height - 1) // height
        state = jax.lax.fori_loop(1, blocks, add_more, state)

    def of_rows(name, given):
        return state[name] if name in state else None if given is None else spread(rows, given.astype(jnp.float32))

    return ColumnStatistics(
        sums=state["sums"].reshape(batch, heads, length),
        counts=state["counts"].reshape(batch, heads) if "counts" in state else None,
        lse=of_rows("lse", lse),
        maximum=of_rows("maximum", maximum),
        column_maximum=state["column_maximum"].reshape(batch, heads, length) if options.column_maximum else None,
    )
