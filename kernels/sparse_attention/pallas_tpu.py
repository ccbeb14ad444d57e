"""A Pallas kernel for TPUs.

    grid      (row of the batch and list head, block of queries)
    lists     | count | 0 | 3 | 7 | 8 | 9 |      this block's, and the next one's, in SMEM
    keys      [ block 0 | block 3 | block 7 | block 8 ]   step 0      copied from HBM while the step before is computed
    values    [ block 9 |    0    |    0    |    0    ]   step 1      nothing is copied or computed past the count

A step is one product of all queries of the block, of all query heads that share the list, with several blocks of keys.
While the last step of a block of queries is computed, the first step of the next one is copied. Only steps with a key
behind the first query, or out of a window, or with fewer blocks than there is room for, look at a mask. Of tokens that
were moved (`Lists.order`) all do; the places of a list's keys then lie in VMEM.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlcache_jax.kernels.sparse_attention.loose import with_loose
from vlcache_jax.kernels.sparse_attention.types import Lists, Options
from vlcache_jax.kernels.varying import refuse_if_checked

LANES = 128
_LOGITS = 2**19  # float32 logits of a step: a fraction of VMEM
_KEYS = 1024  # most keys of a step
_LOWEST = float(jnp.finfo(jnp.float32).min)
_BEHIND = 2**24  # behind all places


def sparse_attention(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, lists: Lists, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """See `api.sparse_attention`."""
    batch, length, heads, head_dim = query.shape
    kv_heads, (list_heads, blocks, capacity) = key.shape[2], lists.ids.shape[1:]
    group, sharing, rows = heads // list_heads, list_heads // kv_heads, lists.rows
    refuse_if_checked("pallas_tpu")
    if lists.columns % LANES or rows % LANES:
        raise NotImplementedError(
            f"pallas_tpu serves blocks of a multiple of {LANES} queries and keys, not {rows} and {lists.columns}"
        )
    if head_dim > 512:
        raise NotImplementedError(f"pallas_tpu serves heads of up to 512, not {head_dim}: blocks would not fit VMEM")
    if group * rows * lists.columns > 4 * _LOGITS:
        raise NotImplementedError(f"pallas_tpu serves up to {4 * _LOGITS // (rows * lists.columns)} heads of a list")
    width = min(_LOGITS // (group * rows * lists.columns), _KEYS // lists.columns, capacity)
    width = max(1, width)

    channels = head_dim + -head_dim % LANES

    def flat(x: jax.Array, size: int) -> jax.Array:  # [batch, tokens, heads * channels]: what a projection gives
        if x.shape[1] % size or head_dim % LANES:
            x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, -head_dim % LANES)))
        return x.reshape(batch, x.shape[1], -1)

    table = jnp.concatenate([lists.counts[..., None], lists.ids], axis=3).astype(jnp.int32)
    table = table.reshape(batch * list_heads, blocks, 1, 1 + capacity)
    sizes = _Sizes(rows, lists.columns, width, channels, list_heads, sharing)
    arrays = flat(query, rows), flat(key, lists.columns), flat(value, lists.columns)
    order: tuple[jax.Array, ...] = ()
    if lists.order is not None:  # f32, which can be turned round; what is padded is seen by none and sees none
        shapes = (lists.order.places, (-1, lists.columns), _BEHIND), (lists.order.limits, (blocks, 1, rows), 0)
        order = tuple(
            jnp.pad(x, ((0, 0), (0, 0), (0, -length % shape[-1])), constant_values=filler)
            .reshape(batch * list_heads, *shape)
            .astype(jnp.float32)
            for x, shape, filler in shapes
        )
    out, lse = _call(options, *arrays, table, order, sizes, interpret)
    out = out.reshape(batch, -1, heads, channels)[:, :length, :, :head_dim]
    lse = lse.reshape(batch, list_heads, blocks, group, rows).transpose(0, 2, 4, 1, 3).reshape(batch, -1, heads)
    if lists.loose is None:
        return out, lse[:, :length]
    out, lse = with_loose(options, query, key, value, lists, out.astype(jnp.float32), lse[:, :length])
    return out.astype(value.dtype), lse


class _Sizes(NamedTuple):
    rows: int  # queries of a block
    columns: int  # keys of a block
    width: int  # blocks of keys of a step
    channels: int  # of a head, a multiple of the lanes
    list_heads: int
    sharing: int  # lists of a KV head


def _call(options, q, k, v, table, order, sizes, interpret):
    """q [batch, tokens, heads * d], k v [batch, tokens, kv_heads * d], table [batch * list heads, blocks, 1, 1 + ids].

    order () or f32 (places [batch * list heads, key blocks, columns], limits [batch * list heads, blocks, 1, rows]).
    Returns out like q, and lse f32 [batch * list heads, blocks, 1, query heads of a list * rows].
    """
    rows, columns, width, channels, list_heads, sharing = sizes
    (lists, blocks), capacity = table.shape[:2], table.shape[3] - 1
    group = q.shape[2] // (list_heads * channels)
    queries = group * rows
    pairs = lists * blocks * queries * capacity * columns
    copied = lists * blocks * capacity * columns * channels * (k.dtype.itemsize + v.dtype.itemsize)
    there = sum(x.size * x.dtype.itemsize for x in (q, table, *order))
    there += q.size * v.dtype.itemsize + 4 * q.size // channels
    dtype = jnp.promote_types(q.dtype, k.dtype)

    def kernel(table_ref, next_ref, q_ref, k_ref, v_ref, *refs):
        # table_ref and next_ref i32 [1, 1 + capacity] in SMEM; q_ref and out_ref [rows, group * d]; lse_ref
        # [1, queries]; k_ref and v_ref [batch, tokens, kv_heads * d] in HBM; of an order also places_ref
        # [key blocks, columns] and limits_ref [1, rows]
        order_refs, (out_ref, lse_ref, *scratch) = refs[: len(order)], refs[len(order) :]
        queries_ref, k_buffer, v_buffer, highest_ref, total_ref, sum_ref, semaphores, state = scratch
        block = pl.program_id(1)
        row = jax.lax.div(pl.program_id(0), list_heads)
        kv_head = jax.lax.div(jax.lax.rem(pl.program_id(0), list_heads), sharing)
        count = table_ref[0, 0]
        steps = pl.cdiv(count, width)

        def copies(ids_ref: Any, step: Any, buffer: Any, wait: bool) -> None:
            """Starts or awaits the copies of a step; values of what is not there are zeros, since 0 * NaN is NaN."""
            for place in range(width):
                entry = step * width + place
                target = pl.ds(place * columns, columns)

                @pl.when(entry < ids_ref[0, 0])
                def _(entry=entry, target=target):
                    number = 0 if wait else ids_ref[0, 1 + entry]  # of a copy that is awaited only the size matters
                    tokens = pl.ds(pl.multiple_of(number * columns, columns), columns)
                    source = row, tokens, pl.ds(pl.multiple_of(kv_head * channels, channels), channels)
                    for x, (ref, copied) in enumerate(((k_ref, k_buffer), (v_ref, v_buffer))):
                        copy = pltpu.make_async_copy(
                            ref.at[source], copied.at[buffer, target], semaphores.at[x, buffer]
                        )
                        copy.wait() if wait else copy.start()

                if not wait:

                    @pl.when(entry >= ids_ref[0, 0])
                    def _(target=target):
                        v_buffer[buffer, target] = jnp.zeros((columns, channels), v_buffer.dtype)

        # state: the buffer of the next step, and whether its copies were started by the block of queries before
        @pl.when(block == 0)
        def _():
            state[0] = state[1] = 0

        @pl.when((steps > 0) & (state[1] == 0))
        def _():
            copies(table_ref, 0, state[0], wait=False)

        for g in range(group):
            queries_ref[g * rows : (g + 1) * rows] = q_ref[:, g * channels : (g + 1) * channels]
        highest_ref[...] = jnp.full_like(highest_ref, _LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        follows = (block + 1 < blocks) & (next_ref[0, 0] > 0)

        def step(t: Any, buffer: Any) -> Any:
            other = 1 - buffer

            @pl.when(t + 1 < steps)
            def _():
                copies(table_ref, t + 1, other, wait=False)

            @pl.when((t + 1 == steps) & follows)
            def _():
                copies(next_ref, 0, other, wait=False)

            copies(table_ref, t, buffer, wait=True)
            # Ids ascend: the last one of a step tells whether all of it lies before the first query.
            last = table_ref[0, 1 + jnp.minimum((t + 1) * width, count) - 1]
            edge = ((last + 1) * columns > block * rows) | ((t + 1) * width > count)
            if options.window is not None:
                first = table_ref[0, 1 + t * width]
                edge |= first * columns <= (block + 1) * rows - 1 - options.window

            def mask_of_order() -> jax.Array:  # [rows, width * columns]
                places_ref, limits_ref = order_refs
                parts = []
                for place in range(width):
                    entry = jnp.minimum(t * width + place, capacity - 1)
                    there = t * width + place < count
                    number = jnp.where(there, table_ref[0, 1 + entry], 0)
                    parts.append(jnp.where(there, places_ref[pl.ds(number, 1)], float(_BEHIND)))
                limits = jnp.broadcast_to(limits_ref[...], (LANES, rows)).T[:, :1]
                return jnp.concatenate(parts, axis=1) < limits

            def mask() -> jax.Array:  # [rows, width * columns]
                lane = jax.lax.broadcasted_iota(jnp.int32, (1, width * columns), 1)
                column = jnp.zeros_like(lane)
                for place in range(width):
                    entry = jnp.minimum(t * width + place, capacity - 1)
                    start = jnp.where(t * width + place < count, table_ref[0, 1 + entry] * columns, 2**30)
                    column = jnp.where(lane >= place * columns, start - place * columns, column)
                column += lane
                row = block * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
                seen = column <= row
                if options.window is not None:
                    seen &= column > row - options.window
                return seen

            if order_refs:
                add(buffer, mask_of_order())
                return other

            @pl.when(edge)
            def _():
                add(buffer, mask())

            @pl.when(jnp.logical_not(edge))
            def _():
                add(buffer, None)

            return other

        def add(buffer: Any, seen: jax.Array | None) -> None:
            logits = options.scale * _dot(queries_ref[...].astype(dtype), k_buffer[buffer].astype(dtype), 1)
            if seen is not None:
                logits = logits.reshape(group, rows, -1)
                logits = jnp.where(seen[None], logits, _LOWEST).reshape(queries, -1)
            old = highest_ref[...]  # [queries, 128], equal along the lanes
            new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.exp(logits - new[:, :1])
            if seen is not None:
                weights = weights.reshape(group, rows, -1)
                weights = jnp.where(seen[None], weights, 0).reshape(queries, -1)
            decay = jnp.exp(old - new)
            highest_ref[...] = new
            total_ref[...] = total_ref[...] * decay + jnp.sum(weights, axis=1, keepdims=True)
            part = _dot(weights.astype(v_buffer.dtype), v_buffer[buffer], 0)
            sum_ref[...] = sum_ref[...] * decay[:, :1] + part

        state[0] = jax.lax.fori_loop(0, steps, step, state[0])
        state[1] = ((steps > 0) & follows).astype(jnp.int32)
        total = total_ref[...]
        safe = jnp.where(total == 0, 1, total)
        found = (sum_ref[...] / safe[:, :1]).astype(out_ref.dtype)
        for g in range(group):
            out_ref[:, g * channels : (g + 1) * channels] = found[g * rows : (g + 1) * rows]
        lse = jnp.where(total == 0, -jnp.inf, highest_ref[...] + jnp.log(safe))
        lse_ref[...] = lse.T[:1]

    def list_of(ahead: int) -> pl.BlockSpec:
        def at(h, i):
            return h, jnp.minimum(i + ahead, blocks - 1), 0, 0

        return pl.BlockSpec((None, None, 1, 1 + capacity), at, memory_space=pltpu.SMEM)

    block_spec = pl.BlockSpec(
        (None, rows, group * channels), lambda h, i: (jax.lax.div(h, list_heads), i, jax.lax.rem(h, list_heads))
    )
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    buffer = 2, width * columns, channels
    order_specs = []
    if order:
        order_specs.append(pl.BlockSpec((None, *order[0].shape[1:]), lambda h, i: (h, 0, 0)))
        order_specs.append(pl.BlockSpec((None, None, 1, rows), lambda h, i: (h, i, 0, 0)))
    return pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct((lists, blocks, 1, queries), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(lists, blocks),
            in_specs=[list_of(0), list_of(1), block_spec, in_hbm, in_hbm, *order_specs],
            out_specs=(block_spec, pl.BlockSpec((None, None, 1, queries), lambda h, i: (h, i, 0, 0))),
            scratch_shapes=[
                pltpu.VMEM((queries, channels), q.dtype),
                pltpu.VMEM(buffer, k.dtype),
                pltpu.VMEM(buffer, v.dtype),
                pltpu.VMEM((queries, LANES), jnp.float32),
                pltpu.VMEM((queries, LANES), jnp.float32),
                pltpu.VMEM((queries, channels), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SMEM((2,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        # Of full lists: how full they are is known when it runs.
        cost_estimate=pl.CostEstimate(flops=4 * pairs * channels, transcendentals=pairs, bytes_accessed=copied + there),
        interpret=interpret,
        name="sparse_attention",
    )(table, table, q, k, v, *order)


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """f32 [m, n] from [m, k] and [k, n], or [n, k] where `contract` is 1."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (((1,), (contract,)), ((), ())), exact, preferred_element_type=jnp.float32)
