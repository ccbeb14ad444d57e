"""The TPU kernel: of every row one tile of slots is read, changed and written back, and the rest of the buffer stays.

    buffer[r, h]   | tile | tile | tile | ...        the tile that holds slots[r] is the block of grid step r

A buffer whose last axis does not fill the 128 lanes of a tile (head_dim 64, 80, 96) lies with slots last, as
`decode_attention.pallas_tpu` tells; then the tile has 128 slots.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlcache_jax.kernels.varying import refuse_if_checked

_LANES = 128  # of a TPU tile
_ROW_BYTES = 32  # of the rows of a tile that lie in one column


def append(
    buffers: tuple[jax.Array, ...], new: tuple[jax.Array, ...], slots: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, ...]:
    """See `api.append`.

    Raises:
      NotImplementedError: a buffer whose slots are no whole tiles.
    """
    refuse_if_checked("pallas_tpu")
    tiles = [_tile(buffer) for buffer in buffers]
    last = [buffer.shape[3] % _LANES != 0 for buffer in buffers]  # slots are the last axis

    def swapped(x: jax.Array, slots_last: bool) -> jax.Array:
        return x.swapaxes(2, 3) if slots_last else x

    def block_of_new(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, *x.shape[1:]), lambda row, *_: (row, 0, 0))

    def block(x: jax.Array, tile: int, slots_last: bool) -> pl.BlockSpec:
        _, heads, *rest = x.shape
        shape = (1, heads, rest[0], tile) if slots_last else (1, heads, tile, rest[1])

        def index(row: Any, slots_ref: Any) -> tuple[Any, ...]:
            at = slots_ref[row] // tile
            return (row, 0, 0, at) if slots_last else (row, 0, at, 0)

        return pl.BlockSpec(shape, index)

    kept = [swapped(x, slots_last) for x, slots_last in zip(buffers, last)]
    blocks = [block(*parts) for parts in zip(kept, tiles, last)]

    def kernel(slots_ref: Any, *refs: Any) -> None:
        # i32 [rows] in SMEM; for each buffer [1, heads, width], then [1, heads, tile, width], then the same, written
        new_refs, kept_refs, out_refs = (refs[i * len(kept) : (i + 1) * len(kept)] for i in range(3))
        for new_ref, kept_ref, out_ref, tile, slots_last in zip(new_refs, kept_refs, out_refs, tiles, last):
            wide = jnp.int32 if jnp.issubdtype(out_ref.dtype, jnp.integer) else jnp.float32  # what a mask fits
            old = kept_ref[0].astype(wide)
            slot = jax.lax.broadcasted_iota(jnp.int32, old.shape, 2 if slots_last else 1)
            here = slot == slots_ref[pl.program_id(0)] % tile
            token = jnp.expand_dims(new_ref[0].astype(wide), 2 if slots_last else 1)
            out_ref[0] = jnp.where(here, token, old).astype(out_ref.dtype)

    touched = sum(x.shape[0] * x.shape[1] * x.shape[3] * tile * x.dtype.itemsize for x, tile in zip(buffers, tiles))
    results = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(slots.shape[0],),
            in_specs=[*map(block_of_new, new), *blocks],
            out_specs=blocks,
        ),
        input_output_aliases={1 + len(kept) + i: i for i in range(len(kept))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * touched),
        interpret=interpret,
        name="append",
    )(slots, *new, *kept)
    return tuple(swapped(x, slots_last) for x, slots_last in zip(results, last))


def _tile(buffer: jax.Array) -> int:
    """Slots that are read and written for one."""
    slots, width = buffer.shape[2:]
    tile = _ROW_BYTES // buffer.dtype.itemsize if width % _LANES == 0 else _LANES
    if slots % tile:
        raise NotImplementedError(f"{slots} slots are not a multiple of {tile}: a TPU writes whole tiles")
    return tile
