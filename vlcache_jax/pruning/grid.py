"""Where visual tokens lie in their images: rows and columns, on the host and on the device alike."""

from typing import Any

import numpy as np

from vlcache_jax.inputs import Batch
from vlcache_jax.typing import ModelSpec

_FRAME, _ROW, _COLUMN = 0, 2, 3  # of `Batch.cells`


def grid_of(spec: ModelSpec, batch: Batch, numpy: Any) -> Any:
    """i32 [batch, 3, length]: tile, row and column of each visual token, -1 of others; None if the model's have none.

    In a tile its own rows and columns count, whatever the tile is a part of; of images of any size, tiles are frames.

    Args:
      spec: of the model.
      batch: the prompts.
      numpy: `numpy` or `jax.numpy`, of which the result is.
    """
    index = numpy.asarray(batch.vision_index)
    source = numpy.maximum(index, 0)
    if batch.cells is not None and spec.vision_merge:
        first = numpy.asarray(batch.cells)[:, :: spec.vision_merge**2]  # patches of a feature are consecutive
        if not first.shape[1]:
            return numpy.full((len(index), 3, index.shape[1]), -1, np.int32)
        source = numpy.minimum(source, first.shape[1] - 1)
        frame, row, column = (numpy.take_along_axis(first[..., x], source, axis=1) for x in (_FRAME, _ROW, _COLUMN))
        places = numpy.stack([frame, row // spec.vision_merge, column // spec.vision_merge], axis=1)
    elif spec.vision_grid:
        side = spec.vision_grid
        places = numpy.stack([source // side**2, source % side**2 // side, source % side], axis=1)
    else:
        return None
    return numpy.where(index[:, None] >= 0, places, -1).astype(np.int32)
