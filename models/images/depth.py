"""Pictures of more than 8 bits to 8 bits: integers by their range, floats only where their range is known.

transformers lets Pillow clip them to 0..255 instead, which makes a 16-bit scan white and a picture of 0..1 black.
"""

import numpy as np
from PIL import Image

from vlcache_jax.errors import InputError

_SIXTEEN_BITS = 2**16 - 1
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_FORMAT = 258, 262, 339  # TIFF 6.0, sections 4 and 19


def image_to_8_bits(image: Image.Image, opened: Image.Image, name: str) -> Image.Image:
    """A grey image of more than 8 bits in mode "L"; any other image as it is. `opened` is the one that knows its file.

    16-bit levels count from 0 to 65535, or to what the file says (12 bits, or 16 with a sign). Of mode "I", which holds
    levels of any depth, a PNG or PGM has 16 bits; else the smallest of 8, 16 and 32 bits counts that holds them all.

    Raises InputError for floats, whose range nothing tells, and for negative levels.
    """
    if image.mode == "F":
        low, high = image.getextrema()
        raise InputError(
            f"{name} has floating-point levels (mode F, here from {low:.4g} to {high:.4g}), of which nothing says what "
            "is white: give an array of floats in 0..1, or scale it to 0..255 and convert it to mode L"
        )
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image)
    tags = getattr(opened, "tag_v2", {}) if opened.format == "TIFF" else {}
    bits, signed = int(tags.get(_TIFF_BITS, (0,))[0]), tags.get(_TIFF_FORMAT, (1,))[0] == 2
    if image.mode != "I":
        white = 2**bits - 1 if bits in (12, 16) else _SIXTEEN_BITS
    elif opened.format in ("PNG", "PPM"):
        white = _SIXTEEN_BITS
    elif bits == 16 and signed:
        white = 2**15 - 1
    else:
        unsigned = bits == 32 and not signed
        levels = levels.view(np.uint32) if unsigned else levels
        white = _white_of_wide(levels, 2**32 - 1 if unsigned else 2**31 - 1, name)
    if levels.min() < 0:
        raise InputError(f"{name} has negative grey levels, to {levels.min()}: scale it to 0..255 and use mode L")
    grey = _scaled(levels, white)
    return Image.fromarray(255 - grey if image.mode != "I" and tags.get(_TIFF_PHOTOMETRIC) == 0 else grey)


def array_to_8_bits(array: np.ndarray, described: str) -> np.ndarray:
    """u8 of the same shape.

    uint16 counts from 0 to 65535. Of other integers, values in 0..255 are 8 bits, as transformers takes them, and
    values that use the range of a 32- or 64-bit type are scaled by it. Floats lie in 0..1.

    Raises InputError for all else: nothing says what is white.
    """
    if array.dtype == np.uint8:
        return array
    if np.issubdtype(array.dtype, np.integer):
        low, high = int(array.min()), int(array.max())
        remedy = "give uint8 in 0..255, uint16 in 0..65535 or floats in 0..1"
        if array.dtype == np.uint16:
            if 0 < high <= 255:
                raise InputError(f"{described} has values to {high} only, black in 16 bits: use uint8 for 8 bits")
            return _scaled(array, _SIXTEEN_BITS)
        if low >= 0 and high <= 255:
            return array.astype(np.uint8)
        white = np.iinfo(array.dtype).max
        if low < 0 or array.dtype.itemsize < 4 or high < white // 255:
            raise InputError(
                f"{described} has values from {low} to {high}, beyond 0..255, of which nothing says what is white: "
                f"{remedy}"
            )
        return _scaled(array, white)
    if array.dtype.name == "bfloat16":  # of ml_dtypes, which NumPy does not count as floating
        array = array.astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{described} has an unusable type: give uint8 values in 0..255 or floats in 0..1")
    if not np.isfinite(array).all():
        raise InputError(f"{described} has values that are not finite: replace NaN and infinity first")
    if array.min() < 0 or array.max() > 1:
        raise InputError(
            f"{described} has values from {array.min():.4g} to {array.max():.4g}: floating-point images "
            "lie in 0..1; give 0..255 as uint8"
        )
    # The product is rounded to float32 and then truncated, as transformers does before it resizes.
    return (array.astype(np.float64) * 255).astype(np.float32).astype(np.uint8)


def _white_of_wide(levels: np.ndarray, white: int, name: str) -> int:
    high = int(levels.max())
    fitting = next((size for size in (255, _SIXTEEN_BITS) if high <= size), white)
    if fitting == white and high < white // 255:
        raise InputError(
            f"{name} has grey levels to {high}, more than 16 bits but black in 32: scale it to 0..255 and use mode L"
        )
    return fitting


def _scaled(levels: np.ndarray, white: int) -> np.ndarray:
    if levels.dtype.itemsize == 2:  # a table: float64 of a large scan would take eight times its memory
        table = np.rint(np.minimum(np.arange(2**16), white) * (255 / white)).astype(np.uint8)
        return table[levels]
    grey = np.empty(levels.shape, np.uint8)
    for row, of_row in enumerate(levels):
        grey[row] = np.rint(np.minimum(of_row, white) * (255 / white))
    return grey
