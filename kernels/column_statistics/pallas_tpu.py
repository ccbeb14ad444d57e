"""Pallas kernels for TPUs.

    columns    |   c = 0   |   c = 1   |   c = 2   |        outermost: the sums of a block of columns stay in VMEM
    rows r = 0 |###########|#####      |           |        while the blocks of rows pass by; blocks without a visible
    rows r = 1 |###########|###########|##         |        entry are neither fetched nor computed

`_add` makes one pass over the keys and needs the rows' log-sum-exp and maximum; where they are not given, `_measure`
(rows outermost, softmax statistics kept in VMEM) computes them first. All query heads of a KV head share a block of
keys. Row statistics travel as [group, rows], rows along the lanes: one number in each row of a tile would take 128
times the memory.

Where rows see columns after their own (`Rows.last`, images), how far the prompt's rows do at most is one more scalar,
which widens the range of blocks; within them each row's own last column decides.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlcache_jax.kernels.column_statistics.types import ColumnStatistics, Options, Rows, spread
from vlcache_jax.kernels.varying import refuse_if_checked

LANES = 128
_LOGITS = 512 * 512  # float32 logits of one block: a fraction of VMEM
_ROWS = 128  # rows of a block, unless the array has fewer
_COLUMNS = 1024  # most columns of a block
_LOWEST = float(jnp.finfo(jnp.float32).min)


def column_statistics(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    rows: Rows,
    lse: jax.Array | None,
    maximum: jax.Array | None,
    *,
    interpret: Any = False,
) -> ColumnStatistics:
    """See `api.column_statistics`."""
    batch, size, heads, head_dim = query.shape
    length, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    refuse_if_checked("pallas_tpu")
    if head_dim > 512:
        raise NotImplementedError(f"pallas_tpu serves heads of up to 512, not {head_dim}: blocks would not fit VMEM")
    height = _ROWS if size > _ROWS else -(-size // 16) * 16
    if group * height * LANES > 4 * _LOGITS:
        raise NotImplementedError(f"pallas_tpu serves up to 64 query heads per KV head, not {group}")
    width = _LOGITS // (group * height) // LANES * LANES
    width = min(max(width, LANES), _COLUMNS, -(-length // LANES) * LANES)

    def by_head(x: jax.Array) -> jax.Array:  # [batch, rows, heads, ...] -> [batch, kv_heads, group, padded rows, ...]
        x = jnp.moveaxis(x.reshape(batch, size, kv_heads, group, *x.shape[3:]), 1, 3)
        return jnp.pad(x, [(0, -size % height if axis == 3 else 0) for axis in range(x.ndim)])

    q, k = by_head(query), key.swapaxes(1, 2)
    last, reach = None, jnp.zeros_like(rows.start)  # how many columns after its own a row sees, at most
    if rows.last is not None:
        index = jax.lax.iota(jnp.int32, size)[None]
        inside = (index >= rows.low[:, None]) & (index < rows.high[:, None])
        reach = jnp.max(jnp.where(inside, rows.last - rows.start[:, None] - index, 0), axis=1)
        last = jnp.pad(rows.last, ((0, 0), (0, -size % height)))[:, None]
    tables = (rows.start, rows.low, rows.high, reach)
    given_lse, given_maximum = (None if x is None else by_head(x.astype(jnp.float32)) for x in (lse, maximum))
    need_maximum = given_maximum is None and (given_lse is None or options.log_threshold is not None)
    if given_lse is None or need_maximum:
        found = _measure(options, q, k, tables, last, height, width, given_lse is None, interpret)
        given_lse = found[1] if given_lse is None else given_lse
        given_maximum = found[0] if given_maximum is None else given_maximum
    sums, counts, column_maximum = _add(options, q, k, tables, last, given_lse, given_maximum, height, width, interpret)

    def by_row(x: jax.Array) -> jax.Array:
        return spread(rows, x.reshape(batch, heads, -1)[..., :size].swapaxes(1, 2))

    def by_column(x: jax.Array) -> jax.Array:
        return x.reshape(batch, heads, length)

    return ColumnStatistics(
        sums=by_column(sums),
        counts=None if counts is None else jnp.sum(counts.astype(jnp.float32), axis=-1).reshape(batch, heads),
        lse=by_row(given_lse),
        maximum=None if given_maximum is None else by_row(given_maximum),
        column_maximum=None if column_maximum is None else by_column(column_maximum),
    )


# Integer divisions below are `lax.div`: `//` corrects the sign of what is never negative.


def _last_column_block(start, low, high, reach, r, height, width):
    """The last block of columns that the block r of rows sees; -1 if none of its rows counts."""
    end = jnp.minimum(high, (r + 1) * height)  # local
    return jnp.where(end > jnp.maximum(low, r * height), jax.lax.div(start + end - 1 + reach, width), -1)


def _row_blocks(start, low, high, reach, c, height, width):
    """First and last block of rows that see the block c of columns; an empty range if none does."""
    first = jnp.maximum(low, c * width - start - reach)
    block = jax.lax.div(first, height)
    return block, jnp.where(high > first, jax.lax.div(high - 1, height), block - 1)


def _logits(options, q_ref, k_ref):
    """f32 [group * rows, columns] from q_ref [group, rows, d] and k_ref [columns, d]."""
    group, height, head_dim = q_ref.shape
    exact = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    q = q_ref[...].reshape(group * height, head_dim)
    dimensions = (((1,), (1,)), ((), ()))
    product = jax.lax.dot_general(q, k_ref[...], dimensions, precision=exact, preferred_element_type=jnp.float32)
    return product * options.scale


def _visible(start, low, high, r, c, height, width, last_ref):
    """bool [rows, columns] of block (r, c); last_ref [1, rows], or None."""
    row = r * height + jax.lax.broadcasted_iota(jnp.int32, (height, width), 0)
    column = c * width + jax.lax.broadcasted_iota(jnp.int32, (height, width), 1)
    last = start + row if last_ref is None else _stand(last_ref[...])
    return (column <= last) & (row >= low) & (row < high)


def _stand(row):
    """[1, rows] along the lanes -> [rows, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _cost(q, k, statistics, exponentials):
    """Of the prompt's last rows, that many exponentials a pair: row i of n sees length - n + 1 + i columns."""
    batch, kv_heads, group, n, head_dim = q.shape
    length = k.shape[2]
    pairs = batch * kv_heads * group * n * (2 * length - min(n, length) + 1) // 2
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (q, k, *statistics))
    return pl.CostEstimate(flops=2 * pairs * head_dim, transcendentals=exponentials * pairs, bytes_accessed=moved)


def _measure(options, q, k, tables, last, height, width, with_lse, interpret):
    """Row maxima, and log-sum-exps if asked for: f32 [batch, kv_heads, group, rows], arbitrary outside the slice."""
    batch, kv_heads, group, size, head_dim = q.shape
    blocks = pl.cdiv(k.shape[2], width)

    def kernel(start_ref, low_ref, high_ref, reach_ref, q_ref, k_ref, *refs):
        # q_ref [group, rows, d], k_ref [columns, d], outputs [group, rows], scratch [group * rows, 128]
        last_ref, refs = (None, refs) if last is None else (refs[0], refs[1:])
        outputs, scratch = refs[: len(refs) // 2], refs[len(refs) // 2 :]
        b, r, c = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        bounds = start_ref[b], low_ref[b], high_ref[b], reach_ref[b]

        @pl.when(c == 0)
        def _():
            scratch[0][...] = jnp.full_like(scratch[0], _LOWEST)
            if with_lse:
                scratch[1][...] = jnp.zeros_like(scratch[1])

        @pl.when(c <= _last_column_block(*bounds, r, height, width))
        def _():
            logits = _logits(options, q_ref, k_ref)
            visible = _visible(*bounds[:3], r, c, height, width, last_ref)
            for g in range(group):
                part = slice(g * height, (g + 1) * height)
                part_logits = jnp.where(visible, logits[part], _LOWEST)
                old = scratch[0][part]  # [rows, 128], equal along the lanes
                new = jnp.maximum(old, jnp.max(part_logits, axis=1, keepdims=True))
                scratch[0][part] = new
                if with_lse:
                    total = jnp.sum(jnp.exp(part_logits - new[:, :1]), axis=1, keepdims=True)
                    scratch[1][part] = scratch[1][part] * jnp.exp(old - new) + total

        @pl.when(c == blocks - 1)
        def _():
            for g in range(group):
                part = slice(g * height, (g + 1) * height)
                highest = scratch[0][part]
                outputs[0][g : g + 1] = highest.T[:1]
                if with_lse:
                    outputs[1][g : g + 1] = (highest + jnp.log(scratch[1][part])).T[:1]

    def key_block(b, h, r, c, start, low, high, reach):
        end = _last_column_block(start[b], low[b], high[b], reach[b], r, height, width)
        return b, h, jnp.clip(c, 0, jnp.maximum(end, 0)), 0

    count = 2 if with_lse else 1
    out_shape = [jax.ShapeDtypeStruct(q.shape[:4], jnp.float32)] * count
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, kv_heads, size // height, blocks),
            in_specs=[
                pl.BlockSpec((None, None, group, height, head_dim), lambda b, h, r, c, *_: (b, h, 0, r, 0)),
                pl.BlockSpec((None, None, width, head_dim), key_block),
                *([] if last is None else [pl.BlockSpec((None, 1, height), lambda b, h, r, c, *_: (b, 0, r))]),
            ],
            out_specs=[pl.BlockSpec((None, None, group, height), lambda b, h, r, c, *_: (b, h, 0, r))] * count,
            scratch_shapes=[pltpu.VMEM((group * height, LANES), jnp.float32)] * count,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(q, k, out_shape, exponentials=count - 1),
        interpret=interpret,
        name="column_statistics_rows",
    )(*tables, q, k, *([] if last is None else [last]))


def _add(options, q, k, tables, last, lse, maximum, height, width, interpret):
    """Sums [batch, kv_heads, group, length], counts i32 [..., 128], and column maxima over rows; None if unwanted."""
    batch, kv_heads, group, size, head_dim = q.shape
    length, row_blocks = k.shape[2], size // height
    count = options.log_threshold is not None

    def kernel(start_ref, low_ref, high_ref, reach_ref, q_ref, k_ref, lse_ref, *refs):
        # q_ref [group, rows, d], k_ref [columns, d], lse_ref and maximum_ref [group, rows]; sums_ref [group, columns]
        refs = list(refs)
        last_ref = None if last is None else refs.pop(0)  # [1, rows]
        maximum_ref = refs.pop(0) if count else None
        sums_ref = refs.pop(0)
        counts_ref = refs.pop(0) if count else None  # [group, 128]
        top_ref = refs.pop(0) if options.column_maximum else None  # [group, columns]
        b, c, r = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        bounds = start_ref[b], low_ref[b], high_ref[b], reach_ref[b]

        @pl.when(r == 0)
        def _():
            for ref in (sums_ref, top_ref):
                if ref is not None:
                    ref[...] = jnp.zeros_like(ref)

        if count:

            @pl.when((r == 0) & (c == 0))
            def _():
                counts_ref[...] = jnp.zeros_like(counts_ref)

        first, end = _row_blocks(*bounds, c, height, width)

        @pl.when((r >= first) & (r <= end))
        def _():
            logits = _logits(options, q_ref, k_ref)
            visible = _visible(*bounds[:3], r, c, height, width, last_ref)
            for g in range(group):
                part = logits[g * height : (g + 1) * height]
                weights = jnp.where(visible, jnp.exp(part - _stand(lse_ref[g : g + 1])), 0)
                sums_ref[g : g + 1] += jnp.sum(weights, axis=0, keepdims=True)
                if options.column_maximum:
                    top_ref[g : g + 1] = jnp.maximum(top_ref[g : g + 1], jnp.max(weights, axis=0, keepdims=True))
                if count:
                    large = visible & (part - _stand(maximum_ref[g : g + 1]) >= options.log_threshold)
                    columns = jnp.sum(large.astype(jnp.int32), axis=0, keepdims=True)
                    counts_ref[g : g + 1] += sum(columns[:, i : i + LANES] for i in range(0, width, LANES))

    def row_block(b, c, r, start, low, high, reach):
        first, end = _row_blocks(start[b], low[b], high[b], reach[b], c, height, width)
        return jnp.clip(r, jnp.clip(first, 0, row_blocks - 1), jnp.clip(end, 0, row_blocks - 1))

    def key_block(b, h, c, r, start, low, high, reach):
        return b, h, jnp.minimum(c, jax.lax.div(jnp.maximum(start[b] + high[b] - 1 + reach[b], 0), width)), 0

    in_statistics = pl.BlockSpec(
        (None, None, group, height), lambda b, h, c, r, *tables: (b, h, 0, row_block(b, c, r, *tables))
    )

    def in_last(b, h, c, r, *tables):
        return b, 0, row_block(b, c, r, *tables)

    out_columns = pl.BlockSpec((None, None, group, width), lambda b, h, c, r, *_: (b, h, 0, c))
    out_specs = [out_columns]
    out_shape = [jax.ShapeDtypeStruct((batch, kv_heads, group, length), jnp.float32)]
    if count:
        out_specs.append(pl.BlockSpec((None, None, group, LANES), lambda b, h, c, r, *_: (b, h, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((batch, kv_heads, group, LANES), jnp.int32))
    if options.column_maximum:
        out_specs.append(out_columns)
        out_shape.append(out_shape[0])
    outputs = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, kv_heads, pl.cdiv(length, width), row_blocks),
            in_specs=[
                pl.BlockSpec(
                    (None, None, group, height, head_dim),
                    lambda b, h, c, r, *tables: (b, h, 0, row_block(b, c, r, *tables), 0),
                ),
                pl.BlockSpec((None, None, width, head_dim), key_block),
                in_statistics,
                *([] if last is None else [pl.BlockSpec((None, 1, height), in_last)]),
                *([in_statistics] if count else []),
            ],
            out_specs=out_specs,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(q, k, [lse, *out_shape], exponentials=1),
        interpret=interpret,
        name="column_statistics",
    )(*tables, q, k, lse, *([] if last is None else [last]), *([maximum] if count else []))
    outputs = list(outputs)
    return outputs.pop(0), outputs.pop(0) if count else None, outputs.pop(0) if options.column_maximum else None
