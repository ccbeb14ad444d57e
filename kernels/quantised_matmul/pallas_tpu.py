"""The TPU kernel, for codes in groups: XLA makes a copy of such weights as floats.

A grid step multiplies [rows, block] with a tile of codes [block, features], group by group: codes become floats in
registers (whole numbers, exactly), and a group's scales multiply its product. The tile is read from the stack of all
layers, at the layer's number.

    codes [layers, channels, features]     grid: rows x features x channels, the last one summed up

Features that fill no tiles of 128, as on one of several devices, XLA keeps as the last axis but one, so that no memory
is wasted; the kernel then reads the codes like that. Anything else would be a copy of the stack.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlcache_jax.kernels.varying import refuse_if_checked

_LANES = 128  # of a TPU tile
_ROWS = 512  # of x in a grid step, at most
_FEATURES = 512
_X_BYTES = 4 << 20  # of x in a grid step, at most


def quantised_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    layer: jax.Array,
    *,
    interpret: Any = False,
) -> jax.Array:
    """See `api.quantised_matmul`; x is [rows, channels].

    Raises:
      NotImplementedError: a scale per feature, which XLA serves as well, or groups that are no whole tiles.
    """
    refuse_if_checked("pallas_tpu")
    (rows, channels), features, groups = x.shape, codes.shape[2], scales.shape[1]
    size = channels // groups
    if groups == 1:
        raise NotImplementedError("one group: XLA reads its codes as well")
    if size % _LANES:
        raise NotImplementedError(f"groups of {size} channels are not a multiple of {_LANES}")
    row_block, feature_block = min(rows, _ROWS), min(features, _FEATURES)
    most = max(_X_BYTES // (row_block * x.dtype.itemsize * size), 1)
    together = next(n for n in range(min(most, groups), 0, -1) if groups % n == 0)  # groups of a grid step
    block = together * size
    row_blocks, feature_blocks = pl.cdiv(rows, row_block), pl.cdiv(features, feature_block)
    readings = 1 if together == groups else feature_blocks  # of x

    transposed = features % _LANES != 0
    codes_block = pl.BlockSpec((None, block, feature_block), lambda i, j, k, layer_ref: (layer_ref[0], k, j))
    if transposed:
        codes = codes.swapaxes(1, 2)
        codes_block = pl.BlockSpec((None, feature_block, block), lambda i, j, k, layer_ref: (layer_ref[0], j, k))
    tables = [scales] if zeros is None else [scales, zeros]
    result = pl.pallas_call(
        functools.partial(_kernel, groups=together, size=size, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((rows, features), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(row_blocks, feature_blocks, groups // together),
            in_specs=[
                pl.BlockSpec((row_block, block), lambda i, j, k, layer_ref: (i, k)),
                codes_block,
                *[pl.BlockSpec((None, groups, feature_block), lambda i, j, k, layer_ref: (layer_ref[0], 0, j))]
                * len(tables),
            ],
            out_specs=pl.BlockSpec((row_block, feature_block), lambda i, j, k, layer_ref: (i, j)),
            scratch_shapes=[pltpu.VMEM((row_block, feature_block), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * channels * features,
            transcendentals=0,
            bytes_accessed=sum(map(_bytes, (codes, *tables))) // codes.shape[0] * row_blocks
            + (rows * channels * readings + rows * features) * x.dtype.itemsize,
        ),
        interpret=interpret,
        name="quantised_matmul",
    )
    return result(layer[None], x, codes, *tables)


def _kernel(
    _, x_ref: Any, codes_ref: Any, scales_ref: Any, *refs: Any, groups: int, size: int, transposed: bool
) -> None:
    # x [rows, block], codes [block, features] or transposed, scales [all groups, features], zeros the same, if any;
    # out [rows, features], total f32 [rows, features]
    *zeros_refs, out_ref, total_ref = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        total_ref[...] = jnp.zeros_like(total_ref)

    def add(group: Any, _: None) -> None:
        here, number = pl.ds(pl.multiple_of(group * size, size), size), pl.ds(step * groups + group, 1)
        weights = (codes_ref[:, here] if transposed else codes_ref[here, :]).astype(jnp.float32)
        if zeros_refs:
            zeros = zeros_refs[0][number, :]
            weights = weights - (zeros.T if transposed else zeros)
        x = x_ref[:, here]
        product = jax.lax.dot_general(
            x,
            weights.astype(x.dtype),
            (((1,), (1 if transposed else 0,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        )
        total_ref[...] += product * scales_ref[number, :]

    jax.lax.fori_loop(0, groups, add, None)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _bytes(x: jax.Array) -> int:
    return x.size // 2 if x.dtype == jnp.int4 else x.size * x.dtype.itemsize
