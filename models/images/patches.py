"""Images as rows of patches, in the order in which a vision tower of Qwen-VL takes them.

`merge` x `merge` patches that become one visual token are consecutive. So are, where the tower has windows, the tokens
of a window. The order of tokens in the prompt is another one, row by row: `Batch.vision_index` leads from it to theirs,
so nothing is put back in order on the device.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PatchOrder:
    """Where the patches of one image (or frame) lie, and which token of the prompt is made of which of them.

    Attributes:
      cells: i32 [patches, 2], row and column of each patch.
      index: i32 [tokens]: for each visual token, row by row, which `merge`² patches in that order it is made of.
    """

    cells: np.ndarray
    index: np.ndarray


def patch_order(rows: int, columns: int, *, merge: int, window: int | None = None) -> PatchOrder:
    """The order of the patches of a grid.

    Args:
      rows, columns: of patches; multiples of `merge`.
      merge: patches along a side of what becomes one token.
      window: patches along a side of a window, a multiple of `merge`. Windows begin at the top left; those at the right
        and at the bottom are smaller where the grid does not divide.

    Example:
      >>> patch_order(2, 4, merge=2).cells.tolist()
      [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    """
    token_rows, token_columns = rows // merge, columns // merge
    row, column = (x.reshape(-1) for x in np.indices((token_rows, token_columns), np.int32))
    order = np.arange(row.size)
    if window is not None:
        side = window // merge
        order = np.lexsort((order, column // side, row // side))
    down, right = (x.reshape(-1) for x in np.indices((merge, merge), np.int32))
    places = [merge * x[order, None] + inner for x, inner in ((row, down), (column, right))]
    cells = np.stack([x.reshape(-1) for x in places], axis=1).astype(np.int32)
    return PatchOrder(cells, np.argsort(order).astype(np.int32))


def cut_patches(pixels: np.ndarray, cells: np.ndarray, patch: int) -> np.ndarray:
    """The patches of frames [..., height, width, 3] in the order of `cells`: [patches, 3 * frames * patch²].

    Colour before frame before pixels; a still image [height, width, 3] counts as one frame.
    """
    height, width, colours = pixels.shape[-3:]
    frames = pixels.reshape(-1, height // patch, patch, width // patch, patch, colours)
    found = frames[:, cells[:, 0], :, cells[:, 1]]  # [patches, frames, patch, patch, 3]: NumPy puts the index first
    return found.transpose(0, 4, 1, 2, 3).reshape(len(cells), -1)
