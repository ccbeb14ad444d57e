"""From anything a user calls an image to an upright 8-bit RGB `PIL.Image.Image`."""

import io
import os
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vlcache_jax.errors import InputError
from vlcache_jax.models.images.data_url import is_url, read_data_url
from vlcache_jax.models.images.depth import array_to_8_bits, image_to_8_bits

MAX_PIXELS = 100_000_000
"""Larger images are refused, from the header, before anything is decoded: decompression bombs."""

ImageLike = Image.Image | np.ndarray | jax.Array | str | os.PathLike[str]


def is_image_like(value: Any) -> bool:
    """Whether `value` has a type that `load_image` takes."""
    return isinstance(value, (Image.Image, str, os.PathLike)) or hasattr(type(value), "__array__")


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

    A path, a data URL and an opened `PIL.Image.Image` give the same pixels: the EXIF orientation is applied and every
    mode is converted by `convert("RGB")`, which drops an alpha channel (what `transformers.image_utils.load_image`
    does). Of an animation, the first frame counts. Grey levels of more than 8 bits are scaled by their range, unlike in
    transformers, which clips them (see `depth.image_to_8_bits`).

    An array (of NumPy, JAX or anything else with `__array__`) is `[height, width, 3]`, `[height, width, 1]` or
    `[height, width]`; channels first, `[3, height, width]`, where the shape leaves no doubt. Integers lie in 0..255, or
    in 0..65535 as uint16; floating-point values in 0..1 (they are turned into 8 bits, as resizing does in transformers;
    unlike there they are not rescaled a second time). See `depth.array_to_8_bits`.

    Raises:
      InputError: a missing, unreadable, truncated or closed file, too many or no pixels, an unusable array, another
        type.
    """
    if isinstance(source, Image.Image):
        check_pixels(source.height, source.width, name)
        return _decode(source, name)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source, name)
    if hasattr(type(source), "__array__"):
        return _from_array_like(source, name)
    raise InputError(
        f"{name} is a {type(source).__module__}.{type(source).__qualname__}: give a PIL image, an array, the path of a "
        "file or a data URL"
    )


def _from_path(source: str | os.PathLike[str], name: str) -> Image.Image:
    text = os.fspath(source)
    if not isinstance(text, str):
        raise InputError(f"{name} has a path of type {type(text).__name__}: give a str or a pathlib.Path")
    if is_url(text):
        return _from_file(io.BytesIO(read_data_url(text, name)), f"{name} (a data URL)")
    name = f"{name} ({text[:200]!r})"
    try:
        is_file, exists = Path(text).is_file(), Path(text).exists()
    except (OSError, ValueError) as error:  # a name too long, a NUL inside
        raise InputError(f"{name} is not a usable path ({error})") from error
    if not is_file:
        raise InputError(f"{name} is {'not a file' if exists else 'missing'}: check the path")
    return _from_file(text, name)


def _from_file(file: str | IO[bytes], name: str) -> Image.Image:
    with open_image(file, name) as image:
        return _decode(image, name)


def open_image(file: str | IO[bytes], name: str) -> Image.Image:
    """Reads the header of an image, and none of its pixels: what `load_image` decodes.

    Raises:
      InputError: it is no image, or has no or too many pixels.
    """
    try:
        image = Image.open(file, formats=_formats())
    # Pillow warns of 89 million pixels, raises from 179, and raises both where warnings are errors.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{name} has too many pixels; the limit is {MAX_PIXELS / 1e6:.0f} million ({error}): scale it down first"
        ) from error
    except Exception as error:  # decoders raise all sorts of errors on broken headers
        what = "of no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(
            f"{name} cannot be read as an image ({what}): convert it to PNG or JPEG, or fetch it again"
        ) from error
    try:
        check_pixels(image.height, image.width, name)
    except InputError:
        image.close()
        raise
    return image


def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]  # EPS would run Ghostscript on the file


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        upright = image_to_8_bits(ImageOps.exif_transpose(image), image, name)  # a copy, or new
        upright.info.pop("transparency", None)  # converting a palette with it gives the same pixels and a warning
        if upright.mode == "La":  # grey and alpha multiplied, which Pillow converts to nothing else
            upright = upright.convert("LA")
        return upright.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # decoders raise all sorts of errors on broken data
        # Pixels are read when they are first needed; a `with` block has closed the file by then.
        lacks_its_file = isinstance(image, ImageFile.ImageFile) and image.fp is None and bool(image.tile)
        if "closed" in str(error) or lacks_its_file:
            raise InputError(
                f"{name} is closed, or its file is ({error}): use it inside `with Image.open(...)`, give a copy() made "
                "there, or give the path"
            ) from error
        raise InputError(
            f"{name} cannot be decoded ({error}): the file is truncated or corrupt, so fetch it again"
        ) from error


def _from_array_like(source: Any, name: str) -> Image.Image:
    try:
        # An explicit transfer, which jax.transfer_guard("disallow") lets pass.
        array = np.asarray(jax.device_get(source) if isinstance(source, jax.Array) else source)
    except Exception as error:  # a tracer, a deleted or distributed array, a tensor on a GPU
        raise InputError(
            f"{name} is a {type(source).__module__}.{type(source).__qualname__} that cannot be read on the host "
            f"({type(error).__name__}): give a concrete array, by numpy.asarray outside of jit"
        ) from error
    return _from_array(array, name)


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
    array = array_to_8_bits(array, described)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
