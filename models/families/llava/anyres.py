"""LLaVA-NeXT's "any resolution": the whole image once, and tiles of it at a finer resolution.

    image --resize--> | base tile |                                                tile 0
          --resize, pad to the best of some fixed resolutions, cut--> | 1 | 2 |    tiles 1, 2, ...
                                                                      | 3 | 4 |

The language model sees the features of the base tile, then those of the tiles joined to one grid, without the
rows or columns that are only padding, row by row, each row closed by a NEWLINE.

Source: https://llava-vl.github.io/blog/2024-01-30-llava-next/. The rounding is that of transformers'
`modeling_llava_next.py`, which decides how many visual tokens an image has.

LLaVA-OneVision (https://arxiv.org/abs/2408.03326) shrinks a grid of more features than nine tiles have to so many.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlcache_jax.models.images.tiles import split
from vlcache_jax.models.images.transform import resize


def select_resolution(height: int, width: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The resolution (height, width) that shows most of an image's pixels and, among those, wastes fewest."""

    def rank(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - resolution[0] * resolution[1]

    return max(pinpoints, key=rank)  # the first one, if several are equally good


def fitted_shape(height: int, width: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image scaled to just fit in `resolution`, its aspect ratio kept."""
    scale_height, scale_width = resolution[0] / height, resolution[1] / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), resolution[0]), resolution[1]
    return resolution[0], min(math.ceil(width * scale_height), resolution[1])


def cut_tiles(
    image: Image.Image, resolution: tuple[int, int], tile: int, resample: int, name: str = "the image"
) -> np.ndarray:
    """Fits `image` in `resolution`, centred on black, and cuts it by rows into u8 [tiles, tile, tile, 3]."""
    height, width = fitted_shape(image.height, image.width, resolution)
    canvas = np.zeros((*resolution, 3), np.uint8)
    top, left = (resolution[0] - height) // 2, (resolution[1] - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(resize(image, (height, width), resample, name))
    return split(canvas, tile)


def unpadded_range(height: int, width: int, rows: int, columns: int) -> tuple[slice, slice]:
    """Which rows and columns of a `rows` x `columns` feature grid hold the image rather than its padding.

    `height` and `width` are the original image's. Rounded as transformers' `unpad_image` rounds.
    """
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(padding, columns - padding)


def shrunk_shape(rows: int, columns: int, grid: int, max_tiles: int | None) -> tuple[int, int]:
    """Rows and columns that are left of a `rows` x `columns` feature grid, for about `max_tiles` tiles at most."""
    ratio = 0.0 if max_tiles is None else math.sqrt(rows * columns / (max_tiles * grid**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def stretched(size: int, count: int) -> np.ndarray:
    """Where `count` samples spread over `size` cells lie, f32 [count]: 0 is the middle of the first one."""
    scale = np.float32(size) / np.float32(count)
    return np.maximum((np.arange(count, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), 0)


def shrink(index: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid of features, i32 [rows, columns], interpolated bilinearly to the smaller `shape`.

    Returns:
      The nearest features [*shape], and the four features and their weights, i32 and f32 [*shape, 4].
    """
    if shape == index.shape:
        return index, *unmixed(index)
    places = [stretched(size, count) for size, count in zip(index.shape, shape)]
    low = [place.astype(np.int32) for place in places]
    high = [np.minimum(first + 1, size - 1) for first, size in zip(low, index.shape)]
    part = [place - first for place, first in zip(places, low)]
    four = [index[np.ix_(y, x)] for y in (low[0], high[0]) for x in (low[1], high[1])]
    shares = [np.outer(y, x) for y in (1 - part[0], part[0]) for x in (1 - part[1], part[1])]
    near = index[np.ix_(*(first + (share > 0.5) for first, share in zip(low, part)))]
    return near, np.stack(four, axis=-1), np.stack(shares, axis=-1).astype(np.float32)


def unmixed(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features i32 [...] as sums of four, i32 and f32 [..., 4]."""
    return np.stack([index] * 4, axis=-1), np.tile(np.array([1, 0, 0, 0], np.float32), (*index.shape, 1))


def feature_grid(height: int, width: int, resolution: tuple[int, int], tile: int, grid: int) -> np.ndarray:
    """The features of an image's fine tiles, without those of padding, as they lie in the image.

    Args:
      height, width: of the original image, in pixels.
      resolution: what `select_resolution` chose for it.
      tile: side of a tile, in pixels.
      grid: features along one side of a tile.

    Returns:
      i32 [rows, columns]: `tile * grid**2 + feature`, counted from the image's base tile.
    """
    rows, columns = resolution[0] // tile * grid, resolution[1] // tile * grid
    kept_rows, kept_columns = unpadded_range(height, width, rows, columns)
    y = np.arange(rows, dtype=np.int32)[kept_rows, None]
    x = np.arange(columns, dtype=np.int32)[None, kept_columns]
    tile_number = 1 + y // grid * (columns // grid) + x // grid
    return tile_number * grid**2 + y % grid * grid + x % grid


def in_lines(base: np.ndarray, fine: np.ndarray, line_break: float) -> np.ndarray:
    """All tokens of an image in order: `base` [n, ...], then `fine` [rows, columns, ...], each row with its end."""
    widths = ((0, 0), (0, 1), *((0, 0),) * (fine.ndim - 2))
    lines = np.pad(fine, widths, constant_values=line_break)
    return np.concatenate([base, lines.reshape(-1, *fine.shape[2:])])
