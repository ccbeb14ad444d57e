"""What `preprocessor_config.json` asks for: resize, centre crop, rescale, normalise."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.files.limits import IMAGE_SIDE, PIXEL_SCALE
from vlcache_jax.models.images.opening import MAX_PIXELS

# The mean and standard deviation of CLIP's training images (github.com/openai/CLIP, clip/clip.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_NEEDS = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}  # the steps, and what each of them needs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """The steps of CLIP's image processor, with the arithmetic and rounding of transformers' PIL backend.

    Attributes:
      size: (height, width) to resize to, or the length of the shorter edge as a whole number.
      resample: Pillow's filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
      crop_size: (height, width); a smaller image is surrounded by zeros.
      pad_to_square: pad to a square of the mean colour before resizing (LLaVA's original
        `image_aspect_ratio="pad"`).
    """

    do_resize: bool = True
    size: tuple[int, int] | int = 224
    resample: int = Image.Resampling.BICUBIC
    do_center_crop: bool = True
    crop_size: tuple[int, int] = (224, 224)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    pad_to_square: bool = False

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], source: str = "preprocessor_config.json", square: str | None = None
    ) -> "ImageTransform":
        """Reads the forms that transformers 4 and 5 write; a missing entry takes CLIP's default.

        As in transformers, a step whose `do_...` is null is left out, and what a step needs must not be null.

        Args:
          config: the entries of an image processor's configuration.
          source: their file, for messages.
          square: the entry that asks for padding to a square, if one does.

        Raises:
          CheckpointError: an entry is malformed or not supported.
        """
        values: dict[str, Any] = {
            name: config[name] is not None and _Reader(config, source, name).boolean()
            for name in _NEEDS
            if name in config
        }
        for step, needed in _NEEDS.items():
            for name in needed:
                if values.get(step, True) and name in config and config[name] is None:
                    raise CheckpointError(f"{source}: {name} = null is not supported: {step} needs it")
        entries = {key: value for key, value in config.items() if value is not None}
        read = functools.partial(_Reader, entries, source)
        if "size" in entries:
            values["size"] = read("size").edges(shortest=True)
        if "crop_size" in entries:
            values["crop_size"] = read("crop_size").edges(shortest=False)
        if "resample" in entries:
            values["resample"] = read("resample").one_of([int(member) for member in Image.Resampling])
        if "rescale_factor" in entries:
            values["rescale_factor"] = read("rescale_factor").number()
        if "image_mean" in entries:
            values["mean"] = read("image_mean").channels()
        if "image_std" in entries:
            values["std"] = read("image_std").channels(nonzero=True)
        if square is not None and square in entries:
            values["pad_to_square"] = read(square).boolean()
        transform = cls(**values)
        with np.errstate(all="ignore"):
            if not np.isfinite(transform._levels).all():
                raise CheckpointError(
                    f"{source}: rescale_factor, image_mean and image_std make pixels that are not finite: correct them"
                )
        return transform

    def as_dict(self, crop: bool = True) -> dict[str, Any]:
        """What `from_dict` reads, as transformers 5 writes it; without what asks for padding to a square.

        `crop=False` leaves out what is said of cropping, of which some image processors know nothing.
        """
        size, cropped = self.size, self.crop_size
        cropping = {"do_center_crop": self.do_center_crop, "crop_size": {"height": cropped[0], "width": cropped[1]}}
        return (cropping if crop else {}) | {
            "do_convert_rgb": True,
            "do_resize": self.do_resize,
            "size": {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]},
            "resample": int(self.resample),
            "do_rescale": self.do_rescale,
            "rescale_factor": self.rescale_factor,
            "do_normalize": self.do_normalize,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def resized_shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resizing step."""
        if not self.do_resize:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        if height < width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size

    def output_shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what `apply` returns for an image of this shape."""
        if self.pad_to_square:
            height = width = max(height, width)
        return self.crop_size if self.do_center_crop else self.resized_shape(height, width)

    def apply(self, image: Image.Image, name: str = "the image") -> np.ndarray:
        """Pads, resizes and crops an RGB image. Returns u8 [height, width, 3]."""
        if self.pad_to_square:
            image = _pad_to_square(image, self.mean)
        image = resize(image, self.resized_shape(image.height, image.width), self.resample, name)
        pixels = np.asarray(image)
        return center_crop(pixels, self.crop_size) if self.do_center_crop else pixels

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """u8 [..., 3] -> f32 [..., 3]: rescaled, and normalised channel by channel."""
        out = np.empty(pixels.shape, np.float32)
        for channel in range(3):
            out[..., channel] = self._levels[channel][pixels[..., channel]]
        return out

    @functools.cached_property
    def _levels(self) -> np.ndarray:
        # f32 [3, 256]. Each of the 256 values of a channel has one result, so the arithmetic (float64 for the
        # scale, float32 for the rest) is done once.
        levels = np.tile(np.arange(256, dtype=np.float64), (3, 1))
        levels = (levels * self.rescale_factor if self.do_rescale else levels).astype(np.float32)
        if self.do_normalize:
            mean, std = (np.asarray(value, np.float32)[:, None] for value in (self.mean, self.std))
            levels = (levels - mean) / std
        return levels


def settings_given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an image processor's settings say: null says nothing, but of a step (`do_...`) that it is left out."""
    return {key: value for key, value in settings.items() if value is not None or key.startswith("do_")}


def stacked_tiles(rows: Sequence[Sequence[tuple[ImageTransform, np.ndarray]]], tiles: int, side: int) -> np.ndarray:
    """Normalised square tiles by row, f32 [rows, tiles, side, side, 3], padded with zeros.

    Args:
      rows: for each row how each of its images is normalised, and its tiles u8 [tiles of the image, side, side, 3].
      tiles: of a row, at least as many as any has.
      side: of a tile, in pixels.
    """
    pixels = np.zeros((len(rows), tiles, side, side, 3), np.float32)
    for row, images in enumerate(rows):
        start = 0
        for transform, image in images:
            pixels[row, start : start + len(image)] = transform.normalise(image)
            start += len(image)
    return pixels


def resize(image: Image.Image, shape: tuple[int, int], resample: int, name: str = "the image") -> Image.Image:
    """Resizes to `shape` = (height, width). Raises InputError if the result would be unreasonably large."""
    height, width = shape
    if (height, width) == (image.height, image.width):
        return image
    if height * width > MAX_PIXELS:
        raise InputError(
            f"{name} is {image.width} x {image.height} pixels, so elongated that resizing it would take "
            f"{width} x {height} pixels: crop it first"
        )
    return image.resize((width, height), resample=resample)


def center_crop(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The middle of u8 [height, width, 3]; where `shape` is larger, zeros surround the image."""
    for axis, target in enumerate(shape):
        present = pixels.shape[axis]
        if present < target:
            before = math.ceil((target - present) / 2)
            widths = [(0, 0)] * pixels.ndim
            widths[axis] = (before, target - present - before)
            pixels = np.pad(pixels, widths)
        elif present > target:
            start = (present - target) // 2
            pixels = pixels[start : start + target] if axis == 0 else pixels[:, start : start + target]
    return pixels


def _pad_to_square(image: Image.Image, mean: tuple[float, float, float]) -> Image.Image:
    side = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class _Reader:
    """One entry of the configuration, checked."""

    def __init__(self, entries: Mapping[str, Any], source: str, name: str) -> None:
        self.value, self.what = entries[name], f"{source}: {name} = {shorten(entries[name])}"

    def fail(self, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.what} is not supported: expected {expected}")

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.fail("true or false")
        return self.value

    def one_of(self, values: list[int]) -> int:
        if isinstance(self.value, bool) or self.value not in values:
            raise self.fail(f"one of {values}")
        return self.value

    def number(self) -> float:
        if not _is_number(self.value):
            raise self.fail(f"a number {PIXEL_SCALE}")
        return float(self.value)

    def channels(self, nonzero: bool = False) -> tuple[float, float, float]:
        values = self.value if isinstance(self.value, list) else [self.value] * 3
        if len(values) != 3 or not all(_is_number(value) and (abs(value) > 1e-6 or not nonzero) for value in values):
            raise self.fail(f"three {'nonzero ' if nonzero else ''}numbers {PIXEL_SCALE}, for red, green and blue")
        red, green, blue = values
        return red, green, blue

    def edges(self, shortest: bool) -> tuple[int, int] | int:
        value = self.value
        if isinstance(value, dict) and set(value) == {"height", "width"}:
            value = [value["height"], value["width"]]
        elif isinstance(value, dict) and set(value) == {"shortest_edge"} and shortest:
            value = value["shortest_edge"]
        if _is_length(value):
            return value if shortest else (value, value)
        if isinstance(value, list) and len(value) == 2 and all(_is_length(edge) for edge in value):
            return value[0], value[1]
        raise self.fail('{"height": h, "width": w}' + (' or {"shortest_edge": s}' if shortest else ""))


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and value in PIXEL_SCALE


def _is_length(value: Any) -> bool:
    return type(value) is int and value in IMAGE_SIDE
