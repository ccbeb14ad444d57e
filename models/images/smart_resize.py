"""The size that an image has in front of a vision tower that takes any: Qwen-VL's rule."""

import math

from vlcache_jax.errors import InputError

MAX_ASPECT = 200
"""Longer images than this many times their width, or wider ones, are refused, as in transformers."""


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    name: str = "the image",
    frames: int = 1,
    pair: int = 1,
) -> tuple[int, int]:
    """(height, width) to resize an image to: multiples of `factor`, between two areas, nearly of its shape.

    Sides are rounded to the nearest multiple (half to even, as Python's `round`), and then, should the area not lie
    between `min_pixels` and `max_pixels`, scaled and rounded towards it.

    Args:
      height, width: of the image, in pixels.
      factor: side of what becomes one visual token, in pixels.
      min_pixels, max_pixels: least and greatest area, from 1 on.
      name: of the image, for the error.
      frames: of a video, whose area is that of all frames together, their number rounded as the sides are,
      pair: to a multiple of this (Qwen3-VL).

    Raises:
      InputError: an image more than 200 times as long as it is wide, or the reverse.

    Example:
      >>> smart_resize(1080, 1920, factor=28, min_pixels=56 * 56, max_pixels=16384 * 28 * 28)
      (1092, 1932)
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"{name} is {width} x {height} pixels: one side is more than {MAX_ASPECT} times the other: crop it first"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    area = round(frames / pair) * pair * rows * columns
    if area > max_pixels:
        scale = math.sqrt(frames * height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif area < min_pixels:
        scale = math.sqrt(min_pixels / (frames * height * width))
        rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return rows, columns
