"""How an image becomes tiles, and their features visual tokens: what `config.json` fixes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from vlcache_jax.models.processing import anyres
from vlcache_jax.models.processing.transform import ImageTransform, resize

from vlcache_jax.errors import CheckpointError

MODEL_TYPES = ("llava", "llava_next")

# Defaults of transformers' LlavaConfig, LlavaNextConfig and CLIPVisionConfig, for entries that a config
# leaves out.
_IMAGE_TOKEN_ID = 32000
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_LLAVA_TOWER = {"image_size": 336, "patch_size": 14}
_CLIP_TOWER = {"image_size": 224, "patch_size": 32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionLayout:
    """The shape of the vision tower's input and output.

    Attributes:
      image_size: side of a tile, in pixels.
      patch_size: side of a patch, in pixels.
      feature_select: "default" drops the tower's class token, "full" keeps it as a tile's first feature.
      pinpoints: the resolutions (height, width) that LLaVA-NeXT may cut into tiles, multiples of
        `image_size`; empty for LLaVA-1.5, where an image is one tile.
      image_token_id: the token that stands for a visual feature.
    """

    image_size: int
    patch_size: int
    image_token_id: int
    feature_select: str = "default"
    pinpoints: tuple[tuple[int, int], ...] = ()

    @property
    def grid_size(self) -> int:
        """Features along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def features_per_tile(self) -> int:
        """Visual features of one tile."""
        return self.grid_size**2 + (1 if self.feature_select == "full" else 0)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], pinpoints: Any = None) -> "VisionLayout":
        """Reads `config.json`. `pinpoints` are the image processor's, which must agree with the model's."""
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"config.json: model_type = {model_type!r} is not supported: expected one of {MODEL_TYPES}"
            )
        tower = config.get("vision_config")
        if tower is not None and not isinstance(tower, dict):
            raise CheckpointError(f"config.json: vision_config = {tower!r} is not an object")
        tower = _LLAVA_TOWER if not tower else _CLIP_TOWER | tower
        if tower.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise CheckpointError(
                f"config.json: a vision tower of type {tower['model_type']!r} is not supported: expected "
                "clip_vision_model"
            )
        image_size, patch_size = (
            _positive(tower, name, "vision_config.") for name in ("image_size", "patch_size")
        )
        if patch_size > image_size:
            raise CheckpointError(f"config.json: patch_size {patch_size} exceeds image_size {image_size}")
        tokens = {
            name: config[name]
            for name in ("image_token_index", "image_token_id")
            if config.get(name) is not None
        }
        image_token_id = next(iter(tokens.values()), _IMAGE_TOKEN_ID)
        if isinstance(image_token_id, bool) or not isinstance(image_token_id, int) or image_token_id < 0:
            raise CheckpointError(f"config.json: image token {image_token_id!r} is not a token id")
        select = config.get("vision_feature_select_strategy") or "default"
        if select not in ("default", "full"):
            raise CheckpointError(
                f"config.json: vision_feature_select_strategy = {select!r} is not supported: expected "
                '"default" or "full"'
            )
        if model_type == "llava":
            resolutions: tuple[tuple[int, int], ...] = ()
        else:
            if select == "full":
                raise CheckpointError(
                    'config.json: vision_feature_select_strategy = "full" cannot work for llava_next: its '
                    "tiles are joined to one grid, where a class token has no place (transformers fails "
                    'too); use "default"'
                )
            resolutions = _resolutions(config.get("image_grid_pinpoints"), pinpoints, image_size)
        return cls(
            image_size=image_size,
            patch_size=patch_size,
            image_token_id=image_token_id,
            feature_select=select,
            pinpoints=resolutions,
        )

    def check_transform(self, transform: ImageTransform) -> None:
        """Raises CheckpointError unless `transform` yields square tiles of `image_size` from every image."""
        expected = (self.image_size, self.image_size)
        if self.pinpoints:
            # transformers cuts tiles of `crop_size`, whether or not it crops.
            if transform.crop_size[0] != self.image_size:
                raise CheckpointError(
                    f"the image processor cuts tiles of {transform.crop_size[0]} pixels (crop_size), but "
                    f"the vision tower takes {self.image_size}: make the two agree"
                )
            shapes = [(self.image_size, self.image_size), self._base_shape(transform)]
        else:
            shapes = [(1000, 500), (500, 1000), (10, 10)]  # tall, wide and square ones
        for shape in shapes:
            if transform.output_shape(*shape) != expected:
                raise CheckpointError(
                    f"the image processor makes images of {transform.output_shape(*shape)} pixels, but the "
                    f"vision tower takes {expected}: correct size and crop_size"
                )

    def tiles(self, image: Image.Image, transform: ImageTransform, name: str = "the image") -> np.ndarray:
        """The tiles of an RGB image before normalisation, u8 [tiles, image_size, image_size, 3]."""
        if not self.pinpoints:
            return transform.apply(image, name)[None]
        resolution = anyres.select_resolution(image.height, image.width, self.pinpoints)
        base = resize(image, self._base_shape(transform), transform.resample, name)
        fine = anyres.cut_tiles(image, resolution, self.image_size, transform.resample, name)
        if transform.resized_shape(self.image_size, self.image_size) != fine.shape[1:3]:
            fine = np.stack([transform.apply(Image.fromarray(tile), name) for tile in fine])
        return np.concatenate([transform.apply(base, name)[None], fine])

    def feature_index(self, height: int, width: int) -> np.ndarray:
        """Where the visual tokens of an image of this shape take their features from, i32 [visual tokens].

        Counted from the image's first tile; the values of `Batch.vision_index`.
        """
        if not self.pinpoints:
            return np.arange(self.features_per_tile, dtype=np.int32)
        resolution = anyres.select_resolution(height, width, self.pinpoints)
        return anyres.feature_index(height, width, resolution, self.image_size, self.grid_size)

    def _base_shape(self, transform: ImageTransform) -> tuple[int, int]:
        size = transform.size
        return size if isinstance(size, tuple) else (size, size)


def _positive(config: Mapping[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {where}{name} = {value!r} is not a positive whole number")
    return value


def _resolutions(of_model: Any, of_processor: Any, image_size: int) -> tuple[tuple[int, int], ...]:
    of_model = _PINPOINTS if of_model is None else of_model
    of_processor = of_model if of_processor is None else of_processor
    for source, value in (("config.json", of_model), ("the image processor", of_processor)):
        valid = isinstance(value, (list, tuple)) and len(value) > 0
        valid = valid and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value)
        if not valid or not all(type(edge) is int and 1 <= edge <= 16384 for pair in value for edge in pair):
            raise CheckpointError(
                f"{source}: image_grid_pinpoints = {value!r} is not a list of [height, width]"
            )
    model, processor = (
        tuple((height, width) for height, width in value) for value in (of_model, of_processor)
    )
    if set(model) != set(processor):
        raise CheckpointError(
            f"image_grid_pinpoints differ: config.json has {model}, the image processor {processor}; the "
            "number of "
            "visual tokens would not fit the features"
        )
    uneven = [pair for pair in processor if pair[0] % image_size or pair[1] % image_size]
    if uneven:
        raise CheckpointError(
            f"image_grid_pinpoints {uneven} are not multiples of the tower's image_size {image_size}"
        )
    return processor
