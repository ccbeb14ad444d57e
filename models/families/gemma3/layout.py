"""How an image becomes pixels and visual tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.families.family import EncodedImage
from vlcache_jax.models.families.gemma3.config import Gemma3Config
from vlcache_jax.models.families.gemma3.pan_and_scan import PanAndScan, read_pan_and_scan
from vlcache_jax.models.families.tile_layout import TileLayout
from vlcache_jax.models.images.tiles import cells
from vlcache_jax.models.images.transform import ImageTransform, settings_given

# What the image processor's class fills in, where it differs from CLIP's.
_DEFAULTS = {"do_center_crop": False, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@dataclasses.dataclass(frozen=True)
class SquareLayout(TileLayout):
    """One square tile for each image, whatever its shape, between two tokens and line breaks; and so for its crops."""

    pan_and_scan: PanAndScan | None = None

    def encode(
        self, images: Sequence[Image.Image], names: Sequence[str], tokens: Mapping[str, str]
    ) -> list[EncodedImage]:
        """The images of one prompt; see `ImageLayout`."""
        count = self.config.tokens_per_image
        for name in ("boi_token", "eoi_token"):
            if name not in tokens:
                raise CheckpointError(f"tokenizer_config.json names no {name}: download it again, or add it")
        whole = f"\n\n{tokens['boi_token']}{tokens['image_token'] * count}{tokens['eoi_token']}\n\n"
        encoded = []
        for image, name in zip(images, names, strict=True):
            boxes = self._boxes(image.height, image.width)
            pixels = np.stack([self.transform.apply(image.crop(box), name) for box in boxes])
            text = whole
            if len(boxes) > 1:
                crops = " ".join([whole] * (len(boxes) - 1))
                text = f"Here is the original image {whole} and here are some crops to help you see better {crops}"
            features = len(boxes) * count
            encoded.append(EncodedImage(pixels, np.arange(features, dtype=np.int32), features, text))
        return encoded

    def _boxes(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """(left, top, right, bottom) of what the model sees of an image: the whole, and its crops."""
        crops = [] if self.pan_and_scan is None else self.pan_and_scan.crops(height, width)
        return [(0, 0, width, height), *crops]

    def token_regions(self, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Which part of its image each visual token stands for; see `ImageLayout`."""
        grid = (self.config.token_grid,) * 2
        of_images = ([cells(grid, box) for box in self._boxes(*shape)] for shape in shapes)
        return [np.concatenate(boxes).astype(np.float32) for boxes in of_images]

    def files(self, image_token: str) -> dict[str, dict[str, Any]]:
        """What transformers reads a processor from; see `ImageLayout`."""
        kind = {"processor_class": "Gemma3Processor"}
        values = self.transform.as_dict(crop=False)
        if self.pan_and_scan is not None:
            values |= {"do_pan_and_scan": True} | self.pan_and_scan.as_dict()
        return {
            "preprocessor_config.json": values | {"image_processor_type": "Gemma3ImageProcessor"} | kind,
            "processor_config.json": {"image_seq_length": self.config.tokens_per_image} | kind,
        }


def read_layout(config: Gemma3Config, settings: dict[str, Any], source: str) -> SquareLayout:
    """See `Family.read_layout`."""
    transform = ImageTransform.from_dict(_DEFAULTS | settings_given(settings), source)
    return SquareLayout(config, transform, read_pan_and_scan(settings, source))
