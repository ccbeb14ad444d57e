"""The Hopper kernel (Mosaic GPU): a warpgroup per (row, KV head, part of the segment), parts merged afterwards.

Each warpgroup keeps the copies of the next blocks in flight while it multiplies (wgmma) the present one. Long segments
are split into as many parts as fill the GPU; the queries of a KV head are padded to the 64 rows of a wgmma.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from vlcache_jax.kernels.decode_attention.types import Segments, Store
from vlcache_jax.kernels.varying import refuse_if_checked

_ROWS = 64  # of a wgmma
_BLOCK = 64  # slots
_TILE = 8  # slots: a copy to shared memory starts at a multiple of them
_SWIZZLE = 128  # bytes
_PROCESSORS = 132  # of an H100 or H200
_MIN_PART = 128  # slots worth a part of their own
_MEMORY = 112 * 1024  # shared memory of one warpgroup: two fit on a processor

_MASKED = float(jnp.finfo(jnp.float32).min)


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
      NotImplementedError: not a bfloat16 store, or sizes that a wgmma does not take.
    """
    refuse_if_checked("pallas_gpu")
    if segments.skip is not None:
        raise NotImplementedError("pallas_gpu lets all queries of a row see a segment from its first slot on")
    batch, n, heads, head_dim = query.shape
    lengths = segments.lengths
    kv_heads = store.lanes if lengths.shape[1] == 1 else lengths.shape[1]
    group = heads // kv_heads
    rows = n * group
    if store.bits is not None or store.keys.dtype != jnp.bfloat16 or query.dtype != jnp.bfloat16:
        raise NotImplementedError(f"query of {query.dtype} and store of {store.keys.dtype}: only bfloat16")
    if head_dim % (_SWIZZLE // 2) or head_dim > 256:
        raise NotImplementedError(f"head size {head_dim}: only 64, 128, 192 and 256")
    if rows > _ROWS:
        raise NotImplementedError(f"{rows} queries of a KV head: at most {_ROWS}")
    if store.slots < _BLOCK or store.slots % _TILE:
        raise NotImplementedError(f"{store.slots} slots: at least {_BLOCK}, and a multiple of {_TILE}")

    tables = (segments.offsets, segments.offsets + lengths)
    offsets, ends = (jnp.broadcast_to(x, (batch, kv_heads)).astype(jnp.int32) for x in tables)
    return _attend(query, store.keys, store.values, offsets, ends, scale, causal, interpret)


@functools.partial(jax.jit, static_argnames=("scale", "causal", "interpret"))  # compiled once for all layers
def _attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    offsets: jax.Array,
    ends: jax.Array,
    scale: float,
    causal: bool,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    batch, n, heads, head_dim = query.shape
    kv_heads, (lanes, slots) = offsets.shape[1], keys.shape[1:3]
    group = heads // kv_heads
    rows = n * group
    parts = max(1, min(_PROCESSORS // (batch * kv_heads), slots // _MIN_PART))
    buffers = 3 if (6 * _BLOCK + _ROWS) * head_dim * 2 <= _MEMORY else 2

    q = query.reshape(batch, n, kv_heads, group, head_dim).swapaxes(1, 2).reshape(batch, kv_heads, rows, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, _ROWS - rows), (0, 0)))
    kernel = functools.partial(
        _kernel,
        scale=scale,
        queries=n if causal else 1,
        group=group,
        parts=parts,
        buffers=buffers,
        heads_per_lane=kv_heads // lanes,
        dots=_TensorCore if interpret in (None, False) else _Interpreted,
    )
    out, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, parts, _ROWS, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, parts, _ROWS), jnp.float32),
        ),
        grid=(batch, kv_heads, parts),
        grid_names=("row", "head", "part"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({} if interpret in (None, False) else {"interpret": interpret}),
    )(offsets, ends, q, keys, values)

    out, lse = out[:, :, :, :rows], lse[:, :, :, :rows]
    whole = jax.scipy.special.logsumexp(lse, axis=2)
    shares = jnp.exp(lse - jnp.where(whole == -jnp.inf, 0, whole)[:, :, None])
    out = jnp.sum(out * shares[..., None], axis=2)

    def per_row(x: jax.Array) -> jax.Array:  # [batch, kv_heads, rows, ...]
        x = x.reshape(batch, kv_heads, n, group, -1).swapaxes(1, 2)
        return x.reshape(batch, n, heads, -1)

    return per_row(out), per_row(whole)[..., 0]


def _kernel(
    offsets_ref: Any,  # i32 [batch, kv_heads]
    ends_ref: Any,  # i32 [batch, kv_heads]
    q_ref: Any,  # bf16 [batch, kv_heads, _ROWS, head_dim]
    keys_ref: Any,  # bf16 [batch, lanes, slots, head_dim]
    values_ref: Any,  # like keys
    out_ref: Any,  # f32 [batch, kv_heads, parts, _ROWS, head_dim]
    lse_ref: Any,  # f32 [batch, kv_heads, parts, _ROWS]
    *,
    scale: float,
    queries: int,
    group: int,
    parts: int,
    buffers: int,
    heads_per_lane: int,
    dots: Any,
) -> None:
    slots, head_dim = keys_ref.shape[2:]
    row, head, part = (jax.lax.axis_index(name) for name in ("row", "head", "part"))
    lane = jax.lax.div(head, jnp.int32(heads_per_lane))
    offset, end = offsets_ref[row, head], ends_ref[row, head]
    aligned = jax.lax.div(offset, jnp.int32(_TILE)) * _TILE
    blocks = jax.lax.div(end - aligned + (_BLOCK - 1), jnp.int32(_BLOCK))
    share = jax.lax.div(blocks + (parts - 1), jnp.int32(parts))
    first = part * share
    steps = jnp.maximum(jnp.minimum(share, blocks - first), 0)
    layout = plgpu.Layout.WGMMA
    per_query = layout.reduce(1)

    def body(q_smem: Any, k_smem: Any, v_smem: Any, q_barrier: Any, k_barriers: Any, v_barriers: Any) -> None:
        def start_of(step: Any) -> Any:  # the last block of the store is shifted back to fit
            return jnp.minimum(aligned + (first + step) * _BLOCK, slots - _BLOCK)

        def fetch(step: Any, buffer: Any) -> None:
            source = (row, lane, pl.ds(start_of(step), _BLOCK))
            plgpu.copy_gmem_to_smem(keys_ref.at[source], k_smem.at[buffer], k_barriers.at[buffer])
            plgpu.copy_gmem_to_smem(values_ref.at[source], v_smem.at[buffer], v_barriers.at[buffer])

        for i in range(buffers):
            pl.when(i < steps)(functools.partial(fetch, i, i))
        plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem, q_barrier)
        plgpu.barrier_wait(q_barrier)

        def iota(axis: int, width: int) -> jax.Array:
            return plgpu.broadcasted_iota(jnp.int32, (_ROWS, width), axis, layout=layout)

        def step_(step: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, highest, total = carry
            buffer = jax.lax.rem(step, jnp.int32(buffers))
            start = start_of(step)
            wanted = jnp.maximum(aligned + (first + step) * _BLOCK, offset)
            plgpu.barrier_wait(k_barriers.at[buffer])

            logits = dots.logits(q_smem, k_smem.at[buffer]) * scale
            slot = iota(1, _BLOCK) + start
            seen = (slot >= wanted) & (slot < end)
            if queries > 1:  # query i of a causal block does not see the last queries - 1 - i slots
                hidden = (queries - 1) - jax.lax.div(iota(0, _BLOCK), jnp.int32(group))
                seen &= slot < end - hidden
            logits = jnp.where(seen, logits, _MASKED)
            new_highest = jnp.maximum(highest, logits.max(axis=1))
            weights = jnp.exp(logits - jax.lax.broadcast_in_dim(new_highest, logits.shape, [0]))
            weights = jnp.where(seen, weights, 0.0)
            decay = jnp.exp(highest - new_highest)
            total = total * decay + weights.sum(axis=1)
            out *= jax.lax.broadcast_in_dim(decay, out.shape, [0])
            plgpu.barrier_wait(v_barriers.at[buffer])

            @pl.when((start < wanted) | (start + _BLOCK > end))
            def _():  # 0 * NaN would be NaN
                v = _load(v_smem.at[buffer], layout)
                slot = iota(0, head_dim) + start
                inside = (slot >= wanted) & (slot < end)
                v_smem.at[buffer][...] = jnp.where(inside, v.astype(jnp.float32), 0.0).astype(v.dtype)
                plgpu.commit_smem()

            out = dots.add(out, weights.astype(jnp.bfloat16), v_smem.at[buffer])
            pl.when(step + buffers < steps)(functools.partial(fetch, step + buffers, buffer))
            return out, new_highest, total

        def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        start = (
            full((_ROWS, head_dim), 0, layout),
            full((_ROWS,), _MASKED, per_query),
            full((_ROWS,), 0, per_query),
        )
        out, highest, total = jax.lax.fori_loop(0, steps, step_, start)
        empty = total == 0.0
        safe = jnp.where(empty, 1.0, total)
        out_ref.at[row, head, part][...] = out / jax.lax.broadcast_in_dim(safe, out.shape, [0])
        lse_ref.at[row, head, part][...] = jnp.where(empty, -jnp.inf, highest + jnp.log(safe))

    def tiled(*shape: int) -> Any:
        transforms = (plgpu.TilingTransform((8, _SWIZZLE // 2)), plgpu.SwizzleTransform(_SWIZZLE))
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    pl.run_scoped(
        body,
        tiled(_ROWS, head_dim),
        tiled(buffers, _BLOCK, head_dim),
        tiled(buffers, _BLOCK, head_dim),
        plgpu.Barrier(),
        plgpu.Barrier(num_barriers=buffers),
        plgpu.Barrier(num_barriers=buffers),
    )


def _load(ref: Any, layout: Any) -> jax.Array:
    """A load in a given layout; older releases also want an index."""
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


class _TensorCore:
    """The two products of a block, by wgmma."""

    @staticmethod
    def logits(q_ref: Any, k_ref: Any) -> jax.Array:
        """f32 [_ROWS, _BLOCK]."""

        def dot(accumulator: Any) -> jax.Array:
            plgpu.wgmma(accumulator, q_ref, k_ref.transpose((1, 0)))
            return accumulator[...]

        return pl.run_scoped(dot, plgpu.ACC((_ROWS, _BLOCK), jnp.float32))

    @staticmethod
    def add(out: jax.Array, weights: jax.Array, v_ref: Any) -> jax.Array:
        """f32 [_ROWS, head_dim], `out` + `weights` times the values."""
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, v_ref))(plgpu.ACC.init(out))


class _Interpreted:
    """The same for Pallas' interpreter, which knows no wgmma."""

    @staticmethod
    def logits(q_ref: Any, k_ref: Any) -> jax.Array:
        return jnp.dot(q_ref[...], k_ref[...].T, preferred_element_type=jnp.float32)

    @staticmethod
    def add(out: jax.Array, weights: jax.Array, v_ref: Any) -> jax.Array:
        return out + jnp.dot(weights, v_ref[...], preferred_element_type=jnp.float32)
