"""Square tiles of an image, row by row, and the places of what a tower makes of them."""

import numpy as np


def split(pixels: np.ndarray, side: int) -> np.ndarray:
    """Cuts u8 [rows * side, columns * side, 3] into tiles u8 [rows * columns, side, side, 3]."""
    height, width, colours = pixels.shape
    grid = pixels.reshape(height // side, side, width // side, side, colours).swapaxes(1, 2)
    return grid.reshape(-1, side, side, colours)


def cells(shape: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """The cells of a grid (rows, columns) over a box, row by row: f64 [cells, 4], each (left, top, right, bottom)."""
    rows, columns = shape
    left, top, right, bottom = box
    y, x = (axis.reshape(-1) for axis in np.indices(shape))
    scale = np.array([(right - left) / columns, (bottom - top) / rows] * 2)
    return np.stack([x, y, x + 1, y + 1], axis=1) * scale + np.array([left, top] * 2)
