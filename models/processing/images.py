"""From anything a user calls an image to an upright 8-bit RGB `PIL.Image.Image`."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vlcache_jax.errors import InputError

MAX_PIXELS = 100_000_000
"""Larger images are refused, from the header, before anything is decoded: decompression bombs."""

ImageLike = Image.Image | np.ndarray | str | os.PathLike[str]


def is_image_like(value: Any) -> bool:
    """Whether `value` has a type that `load_image` takes."""
    return isinstance(value, (Image.Image, np.ndarray, str, os.PathLike))


def check_pixels(height: int, width: int, name: str) -> None:
    """Raises InputError for an image without pixels or with more than `MAX_PIXELS`."""
    if height < 1 or width < 1:
        raise InputError(f"{name} is {width} x {height} pixels: an image needs at least one pixel")
    if height * width > MAX_PIXELS:
        raise InputError(
            f"{name} is {width} x {height} = {height * width / 1e6:.0f} million pixels, more than the limit "
            f"of {MAX_PIXELS / 1e6:.0f} million: scale it down first"
        )


def load_image(source: ImageLike, name: str = "the image") -> Image.Image:
    """Opens and converts one image. `name` is how error messages call it.

    A path and an opened `PIL.Image.Image` give the same pixels: the EXIF orientation is applied and every
    mode is converted by `convert("RGB")`, which drops an alpha channel (what
    `transformers.image_utils.load_image` does). Of an animation, the first frame counts.

    An array is `[height, width, 3]`, `[height, width, 1]` or `[height, width]`; channels first, `[3, height,
    width]`, where the shape leaves no doubt. Integers lie in 0..255, floating-point values in 0..1 (they are
    turned into 8 bits, as resizing does in transformers; unlike there they are not rescaled a second time).

    Raises:
      InputError: a missing, unreadable or truncated file, too many or no pixels, an unusable array, another
        type.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Image.Image):
        check_pixels(source.height, source.width, name)
        return _decode(source, name)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source, name)
    raise InputError(
        f"{name} is a {type(source).__module__}.{type(source).__qualname__}: give a PIL image, a numpy "
        "array (numpy.asarray of a tensor) or the path of a file"
    )


def _from_path(source: str | os.PathLike[str], name: str) -> Image.Image:
    text = os.fspath(source)
    if not isinstance(text, str):
        raise InputError(f"{name} has a path of type {type(text).__name__}: give a str or a pathlib.Path")
    name = f"{name} ({text[:200]!r})"
    if text.startswith(("http://", "https://", "data:")):
        raise InputError(f"{name} is a URL: download the image and give its path (nothing is fetched here)")
    try:
        is_file, exists = Path(text).is_file(), Path(text).exists()
    except (OSError, ValueError) as error:  # a name too long, a NUL inside
        raise InputError(f"{name} is not a usable path ({error})") from error
    if not is_file:
        raise InputError(f"{name} is {'not a file' if exists else 'missing'}: check the path")
    try:
        image = Image.open(text, formats=_formats())
    # Pillow warns of 89 million pixels, raises from 179, and raises both where warnings are errors.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{name} has too many pixels; the limit is {MAX_PIXELS / 1e6:.0f} million ({error}): scale it down first"
        ) from error
    except Exception as error:  # decoders raise all sorts of errors on broken headers
        raise InputError(
            f"{name} cannot be read as an image ({error}): convert it to PNG or JPEG, or fetch it again"
        ) from error
    with image:
        check_pixels(image.height, image.width, name)
        return _decode(image, name)


def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]  # EPS would run Ghostscript on the file


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        upright = ImageOps.exif_transpose(image)  # a copy
        upright.info.pop("transparency", None)  # converting a palette with it gives the same pixels and a warning
        return upright.convert("RGB")
    except Exception as error:  # decoders raise all sorts of errors on broken data
        raise InputError(
            f"{name} cannot be decoded ({error}): the file is truncated or corrupt, so fetch it again"
        ) from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    described = f"{name}, an array of shape {list(array.shape)} and type {array.dtype},"
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 3), array.shape[2] in (1, 3)
        if first and last:
            raise InputError(
                f"{described} may have its channels first or last: give a PIL image, or an array of shape "
                "[height, width] for grey levels"
            )
        if first:
            array = np.moveaxis(array, 0, 2)
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))):
        raise InputError(
            f"{described} is no image: give [height, width, 3] (RGB), [height, width] (grey) or [3, height, "
            "width]; split a batch of images into a list, and drop an alpha channel by array[..., :3]"
        )
    check_pixels(array.shape[0], array.shape[1], described)
    if array.dtype != np.uint8:
        array = _to_bytes(array, described)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _to_bytes(array: np.ndarray, described: str) -> np.ndarray:
    if np.issubdtype(array.dtype, np.integer):
        if array.min() < 0 or array.max() > 255:
            raise InputError(
                f"{described} has values from {array.min()} to {array.max()}: scale them to 0..255 and use uint8"
            )
        return array.astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise InputError(f"{described} has values that are not finite: replace NaN and infinity first")
        if array.min() < 0 or array.max() > 1:
            raise InputError(
                f"{described} has values from {array.min():.4g} to {array.max():.4g}: floating-point images "
                "lie in 0..1; give 0..255 as uint8"
            )
        # The product is rounded to float32 and then truncated, as transformers does before it resizes.
        return (array.astype(np.float64) * 255).astype(np.float32).astype(np.uint8)
    raise InputError(f"{described} has an unusable type: give uint8 values in 0..255 or floats in 0..1")
