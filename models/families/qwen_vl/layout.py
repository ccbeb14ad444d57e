"""How an image of any size becomes patches, and their features visual tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.models.families.family import EncodedImage
from vlcache_jax.models.families.qwen_vl.config import QwenVLConfig
from vlcache_jax.models.images.patches import cut_patches, patch_order
from vlcache_jax.models.images.smart_resize import smart_resize
from vlcache_jax.models.images.transform import ImageTransform, resize

_PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 28 * 28 * 1280  # of transformers, where the checkpoint does not say


@dataclasses.dataclass(frozen=True)
class PatchLayout:
    """Sizes of images in front of the tower, and their patches in its order.

    Attributes:
      config: of the model.
      transform: the filter of resizing, and how pixels are normalised.
      min_pixels, max_pixels: least and greatest area of a resized image.
    """

    config: QwenVLConfig
    transform: ImageTransform
    min_pixels: int
    max_pixels: int

    def grid(self, height: int, width: int, name: str = "the image") -> tuple[int, int]:
        """Rows and columns of patches of an image of this shape. Raises InputError, naming it, if it is too long."""
        patch, factor = self.config.vision.patch_size, self._token_side
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        rows, columns = smart_resize(height, width, factor=factor, **limits, name=name)
        return rows // patch, columns // patch

    @property
    def _token_side(self) -> int:
        return self.config.vision.patch_size * self.config.vision.merge_size

    def encode(
        self, images: Sequence[Image.Image], names: Sequence[str], tokens: Mapping[str, str]
    ) -> list[EncodedImage]:
        """The images of one prompt; see `ImageLayout`."""
        vision, encoded = self.config.vision, []
        for image, name in zip(images, names, strict=True):
            rows, columns = self.grid(image.height, image.width, name)
            shape = rows * vision.patch_size, columns * vision.patch_size
            pixels = np.asarray(resize(image, shape, self.transform.resample, name))
            order = patch_order(rows, columns, merge=vision.merge_size, window=vision.window)
            patches = cut_patches(pixels, order.cells, vision.patch_size)
            cells = np.pad(order.cells, ((0, 0), (2, 0)))
            text = tokens["image_token"] * len(order.index)
            encoded.append(EncodedImage(patches, order.index, len(order.index), text, cells))
        return encoded

    def normalised(self, rows: Sequence[Sequence[EncodedImage]], tiles: int) -> np.ndarray:
        """f32 [rows, patches, 3 * patch_size²]; see `ImageLayout`."""
        found = np.zeros((len(rows), tiles, 3 * self.config.vision.patch_size**2), np.float32)
        for row, images in enumerate(rows):
            start = 0
            for image in images:
                n = len(image.pixels)
                colours = image.pixels.reshape(n, 3, -1).swapaxes(1, 2)
                found[row, start : start + n] = self.transform.normalise(colours).swapaxes(1, 2).reshape(n, -1)
                start += n
        return found

    def token_regions(self, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Which part of its image each visual token stands for; see `ImageLayout`."""
        found, merge = [], self.config.vision.merge_size
        for height, width in shapes:
            rows, columns = (x // merge for x in self.grid(height, width))
            row, column = (x.reshape(-1) for x in np.indices((rows, columns)))
            boxes = np.stack([column, row, column + 1, row + 1], axis=1)
            found.append((boxes * np.array([width / columns, height / rows] * 2)).astype(np.float32))
        return found

    def files(self, image_token: str) -> dict[str, dict[str, Any]]:
        """What transformers reads a processor from; see `ImageLayout`."""
        vision, kind = self.config.vision, {"processor_class": _PROCESSORS[self.config.model_type]}
        values = self.transform.as_dict() | {
            "image_processor_type": "Qwen2VLImageProcessor",
            "merge_size": vision.merge_size,
            "patch_size": vision.patch_size,
            "size": {"longest_edge": self.max_pixels, "shortest_edge": self.min_pixels},
            "temporal_patch_size": vision.frame_pair,
        }
        values = {key: value for key, value in values.items() if key not in ("do_center_crop", "crop_size")}
        return {"preprocessor_config.json": values | kind, "processor_config.json": {"image_token": image_token} | kind}


def read_layout(config: QwenVLConfig, settings: dict[str, Any], source: str) -> PatchLayout:
    """The layout that the settings of an image processor, found in the file `source`, ask for.

    Raises CheckpointError if they are malformed or do not fit the model.
    """
    vision = config.vision
    for name, own in (
        ("patch_size", vision.patch_size),
        ("merge_size", vision.merge_size),
        ("temporal_patch_size", vision.frame_pair),
    ):
        if settings.get(name, own) != own:
            raise CheckpointError(
                f"{source}: {name} = {shorten(settings[name])}, but the vision tower of config.json has {own}: make "
                "the two agree"
            )
    if settings.get("do_resize") is False:
        raise CheckpointError(f"{source}: do_resize = false is not supported: images come in sizes of all kinds")
    least = _pixels(settings, source, "shortest_edge", "min_pixels", _MIN_PIXELS)
    most = _pixels(settings, source, "longest_edge", "max_pixels", _MAX_PIXELS)
    if least > most:
        raise CheckpointError(f"{source}: images would need at least {least} pixels and at most {most}: correct one")
    others = {key: value for key, value in settings.items() if key not in ("size", "crop_size", "do_center_crop")}
    transform = ImageTransform.from_dict(others | {"do_center_crop": False}, source)
    return PatchLayout(config, transform, least, most)


def _pixels(settings: dict[str, Any], source: str, edge: str, name: str, default: int) -> int:
    """An area, which goes by several names: in `size`, by either, or beside it. They must agree."""
    size = settings.get("size")
    size = size if isinstance(size, dict) else {}
    found = {
        label: value
        for label, value in (
            (f"size.{edge}", size.get(edge)), (f"size.{name}", size.get(name)), (name, settings.get(name)),
        )
        if value is not None
    }  # fmt: skip
    for label, value in found.items():
        if type(value) is not int or not 1 <= value <= 2**30:
            raise CheckpointError(f"{source}: {label} = {shorten(value)} is not supported: expected a number of pixels")
    if len(set(found.values())) > 1:
        listed = " and ".join(f"{label} = {value}" for label, value in found.items())
        raise CheckpointError(
            f"{source}: {listed} are the same limit of an image's pixels, with different values: leave all but one out"
        )
    return next(iter(found.values()), default)
