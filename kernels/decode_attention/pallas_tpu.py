"""The TPU kernel: segments are read from HBM by asynchronous copies, a few blocks ahead of the arithmetic.

The segments of all rows form one sequence of blocks, so that a copy is in flight even between a short segment and the
next. An *item* is a segment in one or several lanes: one KV head, or, if the heads of a row share a segment, as many of
its lanes as are read at once. The grid goes over chunks of items; its first axis is for chips with two cores.

    items       | row 0, head 0 | row 0, head 1 | row 1, head 0 ...
    blocks      | 0 | 1 | 2     | 0             | 0 | 1 ...
                      ^ computed  ^ being copied ^ being copied next

XLA keeps an array whose last axis does not fill the 128 lanes of a tile (head_dim 64, 80, 96) with slots last, so that
no memory is wasted. The kernel then reads it like that, `[head_dim, slots]`, from multiples of 128 slots; anything else
would be a copy of the store. Of a quantised store, one such read is 128 byte columns, four groups of 32 with as many
slots to a byte; there the scales of the keys multiply the queries, group by group, instead of the codes. Where values
have fewer bits than keys, more slots lie in a read of theirs, in another order, and the weights are brought into it:

    keys of 4 bits     | 0-31, 64-95, 128-159, 192-223 | 32-63, 96-127, ... |                  256 slots a read
    values of 2 bits   | 0-31, 128-159, 256-287, 384-415 | 32-63, 160-191, ... | ... | ... |   512 slots a read
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlcache_jax.kernels.decode_attention.types import Segments, Store
from vlcache_jax.kernels.precision import PRECISIONS, Integers
from vlcache_jax.kernels.quantisation import SCALE_DTYPE, scales_of_bits, scales_width
from vlcache_jax.kernels.varying import refuse_if_checked

ALIGNMENT = 16  # of what is read: rows of a TPU tile in bfloat16
_GROUP_ROWS = 32  # byte rows of a quantised group, a TPU tile of bytes
_LANES = 128  # of a TPU tile
_BUFFERS = 3  # blocks being copied or computed
_BLOCK_BYTES = 1 << 19  # wanted size of a block of keys
_MAX_BLOCK = 512  # tokens
_MAX_ROWS_BYTES = 1 << 21  # of the output of one grid step


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes.

    Attributes:
      block: slots of a block.
      copy: slots of one copy; a block is copied in pieces, so that little beyond the end of a segment is read.
      packing: slots in a byte row of the keys and of the values (1 but for 4 and 2 bits).
      alignment: of the first slot that is read.
      group: slots of a quantised group of keys.
      transposed: slots are the last axis.
      slots: of the store.
      lanes: of the store.
      item_lanes: lanes read at once.
      items: of a row.
      chunk: items of a grid step.
      cores: first axis of the grid.
      scale_window: slots of value scales that are read to get those of a block; 0 in a float store.
    """

    block: int
    copy: int
    packing: tuple[int, int]
    alignment: int
    group: int
    transposed: bool
    slots: int
    lanes: int
    item_lanes: int
    items: int
    chunk: int
    cores: int
    scale_window: int


def decode_attention(
    query: jax.Array,
    store: Store,
    segments: Segments,
    *,
    scale: float,
    causal: bool,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_attention`; `query` is [batch, n, heads, head_dim].

    Raises:
      NotImplementedError: sizes that the copies cannot be aligned to.
    """
    refuse_if_checked("pallas_tpu")
    if segments.skip is not None:
        raise NotImplementedError("pallas_tpu lets all queries of a row see a segment from its first slot on")
    if store.bits is not None and not isinstance(PRECISIONS[store.bits], Integers):
        raise NotImplementedError(f"pallas_tpu reads stores of floats and of integers, not bits={store.bits!r}")
    batch, n, heads, head_dim = query.shape
    plan = _plan(query, store, segments)
    group_heads = heads // (plan.items * plan.item_lanes)
    rows = n * group_heads
    total = batch * plan.items

    def per_item(table: jax.Array) -> jax.Array:  # a shared segment is that of every group of lanes
        return jnp.broadcast_to(table, (batch, plan.items)).reshape(total).astype(jnp.int32)

    offsets, lengths = per_item(segments.offsets), per_item(segments.lengths)
    # The first item from i on that has a block.
    index = jnp.where(lengths > 0, jnp.arange(total, dtype=jnp.int32), total)
    following = jnp.append(jax.lax.cummin(index, reverse=True), total)

    q = query.reshape(batch, n, plan.items, plan.item_lanes, group_heads, head_dim)
    q = q.transpose(0, 2, 3, 1, 4, 5).reshape(total, plan.item_lanes, rows, head_dim)

    steps = total // (plan.cores * plan.chunk)
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # ANY would let XLA copy a small store to VMEM

    def per_chunk(width: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (plan.chunk, plan.item_lanes, rows, width), lambda core, step, *_: (core * steps + step, 0, 0, 0)
        )

    def buffer(*shape: int, dtype: Any) -> Any:
        return pltpu.VMEM((_BUFFERS, plan.item_lanes, *shape), dtype)

    stores = [store.keys, store.values]
    shapes = [(plan.block // packing, head_dim) for packing in plan.packing]
    if plan.transposed:
        stores, shapes = [x.swapaxes(2, 3) for x in stores], [shape[::-1] for shape in shapes]
    buffers = [buffer(*shape, dtype=x.dtype) for x, shape in zip(stores, shapes, strict=True)]
    if plan.scale_window:
        stores += [store.key_scales, store.value_scales]
        buffers += [
            buffer(plan.block // plan.group, 2, scales_width(head_dim), dtype=SCALE_DTYPE),
            buffer(2, plan.scale_window, dtype=SCALE_DTYPE),
        ]
    held = store.slots // store.segments  # of a segment, on average: how long each is, is known when it runs
    pairs = batch * n * heads * held
    lane = sum(x.dtype.itemsize * math.prod(x.shape[2:]) for x in stores)  # bytes
    moved = total * plan.item_lanes * held * lane // plan.slots + query.size * (query.dtype.itemsize + 4)
    kernel = functools.partial(_kernel, plan=plan, scale=scale, queries=n if causal else 1, stores=len(stores))
    out, lse = pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((total, plan.item_lanes, rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((total, plan.item_lanes, rows, 1), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(plan.cores, steps),
            in_specs=[per_chunk(head_dim), *[in_hbm] * len(stores)],
            out_specs=(per_chunk(head_dim), per_chunk(1)),
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((2, _BUFFERS)), pltpu.SMEM((4,), jnp.int32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=4 * pairs * head_dim, transcendentals=pairs, bytes_accessed=moved),
        interpret=interpret,
        name="decode_attention",
    )(offsets, lengths, following, q, *stores)

    def per_row(x: jax.Array) -> jax.Array:  # [total, item_lanes, rows, width]
        x = x.reshape(batch, plan.items, plan.item_lanes, n, group_heads, x.shape[-1])
        return x.transpose(0, 3, 1, 2, 4, 5).reshape(batch, n, heads, x.shape[-1])

    return per_row(out), per_row(lse)[..., 0]


def _plan(query: jax.Array, store: Store, segments: Segments) -> _Plan:
    batch, n, heads, head_dim = query.shape
    slots, lanes = store.slots, store.lanes
    quantised = store.bits is not None
    packing = (store.packing, slots // store.values.shape[2])
    transposed = head_dim % _LANES != 0
    rows = _LANES if transposed else _GROUP_ROWS
    alignment = rows * max(packing) if transposed or quantised else ALIGNMENT
    unit = max(_LANES, alignment) if quantised else alignment
    if slots % unit:
        raise NotImplementedError(f"{slots} slots are not a multiple of {unit}: copies of a TPU are whole tiles")
    width = -(-head_dim // _LANES) * _LANES
    slot_bytes = head_dim * store.keys.dtype.itemsize // packing[0]
    shared = segments.lengths.shape[1] == 1
    item_lanes = 1
    if shared:  # as many lanes as a block of the smallest size can hold
        fits = max(1, 2 * _BLOCK_BYTES // (_LANES * slot_bytes))
        item_lanes = max(x for x in range(1, lanes + 1) if lanes % x == 0 and x <= fits)
    items = lanes // item_lanes if shared else segments.lengths.shape[1]

    copy = max(_LANES, alignment) if slots >= _LANES else slots
    block = _BLOCK_BYTES // (slot_bytes * item_lanes) // copy * copy
    block = max(copy, min(block, _MAX_BLOCK, slots // copy * copy))

    total = batch * items
    cores = 2 if total % 2 == 0 else 1
    per_core = total // cores
    rows = heads // items * n
    row_bytes = -(-rows // 8) * 8 * width * 4
    chunk = max(x for x in range(1, per_core + 1) if per_core % x == 0 and (x == 1 or x * row_bytes <= _MAX_ROWS_BYTES))
    return _Plan(
        block=block,
        copy=copy,
        packing=packing,
        alignment=alignment,
        group=_GROUP_ROWS * packing[0],
        transposed=transposed,
        slots=slots,
        lanes=lanes,
        item_lanes=item_lanes,
        items=items,
        chunk=chunk,
        cores=cores,
        scale_window=0 if not quantised else block if transposed else min(block + _LANES, slots),
    )


def _kernel(*refs: Any, plan: _Plan, scale: float, queries: int, stores: int) -> None:
    offsets_ref, lengths_ref, following_ref = refs[:3]  # i32 [total], [total], [total + 1] in SMEM
    q_ref = refs[3]  # [chunk, item_lanes, rows, head_dim]
    store_refs = refs[4 : 4 + stores]  # [batch, lanes, ...] in HBM
    out_ref, lse_ref = refs[4 + stores : 6 + stores]  # f32 [chunk, item_lanes, rows, head_dim or 1]
    buffers = refs[6 + stores : 6 + 2 * stores]  # [_BUFFERS, item_lanes, ...]
    semaphores, state = refs[6 + 2 * stores :]  # [keys or values, _BUFFERS]; i32 [4]
    _, _, rows, head_dim = q_ref.shape

    core, step = pl.program_id(0), pl.program_id(1)
    per_core = pl.num_programs(1) * plan.chunk
    end_item = (core + 1) * per_core

    def base(item: Any) -> Any:
        """The slot from which the segment's blocks are counted."""
        return offsets_ref[item] // plan.alignment * plan.alignment

    def blocks_of(item: Any) -> Any:
        end = offsets_ref[item] + lengths_ref[item]
        return jnp.where(lengths_ref[item] > 0, pl.cdiv(end - base(item), plan.block), 0)

    def bounds(item: Any, block: Any) -> tuple[Any, Any, Any]:
        """First slot that is read, first that counts, and the end of the segment."""
        first = base(item) + block * plan.block
        end = offsets_ref[item] + lengths_ref[item]
        # The last block of the store is shifted back to fit.
        return jnp.minimum(first, plan.slots - plan.block), jnp.maximum(first, offsets_ref[item]), end

    def copies(buffer: Any, item: Any, block: Any, act: Any) -> None:
        """Starts or awaits the copies of a block."""
        row, within = item // plan.items, item % plan.items
        lanes = pl.ds(within * plan.lanes // plan.items, plan.item_lanes)
        start, wanted, end = bounds(item, block)

        def copy(store: int, source: tuple[Any, ...], target: tuple[Any, ...]) -> None:
            source_ref = store_refs[store].at[(row, lanes, *source)]
            target_ref = buffers[store].at[(buffer, slice(None), *target)]
            act(pltpu.make_async_copy(source_ref, target_ref, semaphores.at[store % 2, buffer]))

        for piece in range(plan.block // plan.copy):
            first = start + piece * plan.copy

            @pl.when((first < end) & (first + plan.copy > wanted))
            def _(piece=piece, first=first):
                before = (slice(None),) if plan.transposed else ()
                for store, packing in enumerate(plan.packing):
                    aligned = pl.multiple_of(first // packing, plan.alignment // packing)
                    size = plan.copy // packing
                    copy(store, (*before, pl.ds(aligned, size)), (*before, pl.ds(piece * size, size)))

        if plan.scale_window:
            groups = plan.block // plan.group
            copy(2, (pl.ds(start // plan.group, groups),), ())
            copy(3, (slice(None), pl.ds(window_start(start), plan.scale_window)), ())

    def window_start(start: Any) -> Any:
        first = jnp.minimum(start // _LANES * _LANES, plan.slots - plan.scale_window)
        return pl.multiple_of(first, _LANES)

    # state: item and block to copy next, blocks copied, blocks computed
    def produce() -> None:
        item, block = state[0], state[1]

        @pl.when(item < end_item)
        def _():
            copies(jax.lax.rem(state[2], _BUFFERS), item, block, lambda c: c.start())
            last = block + 1 >= blocks_of(item)
            state[0] = jnp.where(last, following_ref[item + 1], item)
            state[1] = jnp.where(last, 0, block + 1)
            state[2] += 1

    @pl.when(step == 0)
    def _():
        state[0] = following_ref[core * per_core]
        state[1] = state[2] = state[3] = 0
        for _ in range(_BUFFERS - 1):
            produce()

    # Query i of a causal block does not see the last queries - 1 - i slots.
    hidden: Any = 0
    if queries > 1:
        row = jax.lax.broadcasted_iota(jnp.int32, (1, rows, 1), 1)
        hidden = jnp.full((1, rows, 1), queries - 1, jnp.int32)
        for i in range(1, queries):
            hidden -= (row >= i * (rows // queries)).astype(jnp.int32)

    def load(store: int, buffer: Any, dtype: Any) -> jax.Array:
        """[item_lanes, block, head_dim], or transposed; value codes of a quantised store are not scaled."""
        x = buffers[store][buffer]
        if not plan.scale_window:
            return x.astype(dtype)
        packing = plan.packing[store]
        bits = 8 // packing
        x = x.astype(jnp.int32) if plan.transposed else x.astype(jnp.int32).reshape(-1, _GROUP_ROWS, head_dim)
        parts = [(x << (32 - bits * (i + 1))) >> (32 - bits) for i in range(packing)]
        if plan.transposed:  # windows of 128 byte columns, and in each the parts one after the other
            windows = [slice(i, i + _LANES) for i in range(0, x.shape[2], _LANES)]
            x = jnp.concatenate([part[:, :, window] for window in windows for part in parts], axis=2)
            return x.astype(jnp.float32).astype(dtype)
        x = jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=1)
        if store == 0:
            scales = scales_of_bits(buffers[2][buffer]).reshape(-1, 2, head_dim)
            x = x * scales[:, 0:1] + scales[:, 1:2]
        return x.reshape(plan.item_lanes, plan.block, head_dim).astype(dtype)

    def slots_of_block(column: jax.Array, packing: int) -> jax.Array:
        """The slots, counted from the block's first, that the columns of `load` hold."""
        if not plan.scale_window or not plan.transposed:
            return column
        in_read = _LANES * packing
        part, byte = column % in_read // _LANES, column % _LANES
        slot = byte // _GROUP_ROWS * _GROUP_ROWS * packing + part * _GROUP_ROWS + byte % _GROUP_ROWS
        return column // in_read * in_read + slot

    def pieces(packing: int) -> list[int]:
        """The first slot of each 32 columns of `load`, in the order of columns."""
        groups, parts = range(_LANES // _GROUP_ROWS), range(packing)
        reads = range(0, plan.block, _LANES * packing)
        return [read + (group * packing + part) * _GROUP_ROWS for read in reads for part in parts for group in groups]

    def reordered(x: jax.Array, packing: int, wanted: int) -> jax.Array:
        """[..., block] from the order of columns of one packing to that of another; 1: slots ascending."""
        if packing == wanted:
            return x
        places = {slot: i * _GROUP_ROWS for i, slot in enumerate(pieces(packing))}
        return jnp.concatenate([x[..., (i := places[slot]) : i + _GROUP_ROWS] for slot in pieces(wanted)], axis=-1)

    def scaled_dot(q: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
        """f32 [item_lanes, rows, block] from codes [item_lanes, head_dim, block] and the scales of their groups."""
        in_read = _LANES * plan.packing[0]
        group_of_column = jax.lax.broadcasted_iota(jnp.int32, (1, 1, in_read), 2) % _LANES // _GROUP_ROWS
        wide = q.astype(jnp.float32)
        windows = []
        for window in range(plan.block // in_read):
            columns = codes[:, :, window * in_read : (window + 1) * in_read]
            logits = jnp.zeros((*q.shape[:2], in_read), jnp.float32)
            for group in range(_LANES // _GROUP_ROWS):
                row = window * (_LANES // _GROUP_ROWS) + group
                step, zero = scales[:, row, 0:1, :head_dim], scales[:, row, 1:2, :head_dim]
                part = _batched_dot((wide * step).astype(q.dtype), columns)
                part += jnp.sum(wide * zero, axis=-1, keepdims=True)
                logits = jnp.where(group_of_column == group, part, logits)
            windows.append(logits)
        return jnp.concatenate(windows, axis=2)

    def compute(item: Any, block: Any, q: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest, total, out = carry
        buffer = jax.lax.rem(state[3], _BUFFERS)
        copies(buffer, item, block, lambda c: c.wait())
        produce()  # into the buffer computed before this one
        state[3] += 1
        start, wanted, end = bounds(item, block)
        column = jax.lax.broadcasted_iota(jnp.int32, (1, 1, plan.block), 2)
        slot, of_value = (start + slots_of_block(column, packing) for packing in plan.packing)
        seen = (slot >= wanted) & (slot < end - hidden)  # [1, rows or 1, block]

        if not plan.scale_window:

            @pl.when((start < wanted) | (start + plan.block > end))
            def _():  # 0 * NaN would be NaN
                shape = (1, 1, plan.block) if plan.transposed else (1, plan.block, 1)
                slot = start + jax.lax.broadcasted_iota(jnp.int32, shape, shape.index(plan.block))
                inside = (slot >= wanted) & (slot < end)
                v = buffers[1][buffer]
                buffers[1][buffer] = jnp.where(inside, v.astype(jnp.float32), 0).astype(v.dtype)

        k = load(0, buffer, q.dtype)
        if plan.scale_window and plan.transposed:
            logits = scale * scaled_dot(q, k, scales_of_bits(buffers[2][buffer]))
        else:
            logits = scale * _batched_dot(q, k, transposed=not plan.transposed)
        logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
        new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(logits - new_highest), 0)
        decay = jnp.exp(highest - new_highest)
        total = total * decay + jnp.sum(weights, axis=-1, keepdims=True)
        v = load(1, buffer, q.dtype)
        if plan.scale_window:
            scales = scales_of_bits(buffers[3][buffer]).reshape(plan.item_lanes * 2, plan.scale_window)
            if plan.transposed:
                scales, weights = reordered(scales, 1, plan.packing[1]), reordered(weights, *plan.packing)
            else:
                shift = start - window_start(start)
                scales = pltpu.roll(scales, jax.lax.rem(plan.scale_window - shift, plan.scale_window), 1)
            scales = scales[:, : plan.block].reshape(plan.item_lanes, 2, plan.block)
            scales = jnp.where((of_value >= wanted) & (of_value < end), scales, 0)
            zero = jnp.sum(weights * scales[:, 1:2], axis=-1, keepdims=True)
            weights = (weights * scales[:, 0:1]).astype(v.dtype)
            out = out * decay + _batched_dot(weights, v, transposed=plan.transposed) + zero
        else:
            out = out * decay + _batched_dot(weights.astype(v.dtype), v, transposed=plan.transposed)
        return new_highest, total, out

    dtype = jnp.promote_types(q_ref.dtype, q_ref.dtype if plan.scale_window else buffers[0].dtype)

    def item_step(i: Any, _: None) -> None:
        item = core * per_core + step * plan.chunk + i
        q = q_ref[i].astype(dtype)
        start = (
            jnp.full((plan.item_lanes, rows, 1), jnp.finfo(jnp.float32).min, jnp.float32),
            jnp.zeros((plan.item_lanes, rows, 1), jnp.float32),
            jnp.zeros((plan.item_lanes, rows, head_dim), jnp.float32),
        )
        body = lambda block, carry: compute(item, block, q, carry)  # noqa: E731
        highest, total, out = jax.lax.fori_loop(0, blocks_of(item), body, start)
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        out_ref[i] = out / safe
        lse_ref[i] = jnp.where(empty, -math.inf, highest + jnp.log(safe))

    jax.lax.fori_loop(0, plan.chunk, item_step, None)


def _batched_dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """f32 [lanes, m, n] from [lanes, m, k] and [lanes, k, n], or [lanes, n, k] if transposed."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contract = 1 if transposed else 0
    if a.shape[0] == 1:
        dims = (((1,), (contract,)), ((), ()))
        return jax.lax.dot_general(a[0], b[0], dims, precision, preferred_element_type=jnp.float32)[None]
    dims = (((2,), (contract + 1,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)
