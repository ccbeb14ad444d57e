"""How an image becomes tiles, and the tiles' features visual tokens."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.files.limits import PINPOINTS
from vlcache_jax.inputs import NEWLINE
from vlcache_jax.models.families.family import EncodedImage
from vlcache_jax.models.families.frame_tiles import read_frame_tiles
from vlcache_jax.models.families.llava import anyres
from vlcache_jax.models.families.llava.config import IMAGE_PROCESSORS, LlavaConfig
from vlcache_jax.models.families.llava.regions import token_regions
from vlcache_jax.models.families.tile_layout import TileLayout
from vlcache_jax.models.images.frame_sampling import SegmentSampling
from vlcache_jax.models.images.tiles import cells
from vlcache_jax.models.images.transform import ImageTransform, resize, settings_given
from vlcache_jax.models.images.video import Video

_PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
}
_OWN = "LlavaImageProcessor"  # of LLaVA's original code
_VIDEO_DEFAULTS = {"size": {"height": 384, "width": 384}}


@dataclasses.dataclass(frozen=True)
class VisionLayout(TileLayout):
    """Which tiles an image is cut into, and in which order the language model sees their features.

    LLaVA-1.5 has one tile per image, LLaVA-NeXT one for the whole image and those of `anyres`. LLaVA-OneVision does as
    LLaVA-NeXT where a prompt has one image, and has one tile for each, padded to a square, where it has several. Of a
    video it has one tile for each frame, stretched to a square, whose features it shrinks to half as many a side.

    Raises CheckpointError if the image processor's tiles would not fit the vision tower.
    """

    def __post_init__(self) -> None:
        side = self.config.vision.image_size
        if self._is_anyres:
            if self.config.has_class_token:
                raise CheckpointError(
                    f'config.json: vision_feature_select_strategy = "full" cannot work for {self.config.model_type}: '
                    "its tiles are joined to one grid, where a class token has no place (transformers fails, too); "
                    'correct it to "default"'
                )
            # transformers cuts tiles of `crop_size`, whether or not it crops.
            if self.transform.crop_size[0] != side:
                raise CheckpointError(
                    f"the image processor cuts tiles of {self.transform.crop_size[0]} pixels (crop_size), but the "
                    f"vision tower takes {side}: make the two agree"
                )
            shapes = [(side, side), self._base_shape]
        else:
            shapes = [(1000, 500), (500, 1000), (10, 10)]  # tall, wide and square images
        for shape in shapes:
            if self.transform.output_shape(*shape) != (side, side):
                raise CheckpointError(
                    f"the image processor makes images of {self.transform.output_shape(*shape)} pixels, but the vision "
                    f"tower takes {(side, side)}: correct size and crop_size"
                )

    @property
    def _is_anyres(self) -> bool:
        return bool(self.config.grid_pinpoints)

    @property
    def _base_shape(self) -> tuple[int, int]:
        size = self.transform.size
        return size if isinstance(size, tuple) else (size, size)

    def _cut(self, images: int) -> bool:
        """Whether each of the images of a prompt is cut into tiles."""
        return self._is_anyres and (self.config.max_tiles is None or images == 1)

    @property
    def _whole(self) -> ImageTransform:
        """How an image becomes one tile where images are not cut."""
        return dataclasses.replace(self.transform, pad_to_square=True) if self._is_anyres else self.transform

    def tiles(self, image: Image.Image, name: str = "the image", *, images: int = 1) -> np.ndarray:
        """The tiles of an RGB image before normalisation, u8 [tiles, image_size, image_size, 3].

        `images` is how many the prompt has.

        Raises InputError, naming the image by `name`, if it is too elongated to be resized.
        """
        transform, side = self.transform, self.config.vision.image_size
        if not self._cut(images):
            return self._whole.apply(image, name)[None]
        resolution = anyres.select_resolution(image.height, image.width, self.config.grid_pinpoints)
        base = resize(image, self._base_shape, transform.resample, name)
        fine = anyres.cut_tiles(image, resolution, side, transform.resample, name)
        if transform.resized_shape(side, side) != (side, side):
            fine = np.stack([transform.apply(Image.fromarray(tile), name) for tile in fine])
        return np.concatenate([transform.apply(base, name)[None], fine])

    def feature_index(self, height: int, width: int, *, images: int = 1) -> np.ndarray:
        """Where the visual tokens of an image of this shape take their features from, i32 [visual tokens].

        `tile * features_per_tile + feature`, counted from the image's first tile, and NEWLINE for row breaks.
        """
        return self._features(height, width, images)[0]

    def _features(
        self, height: int, width: int, images: int
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        """`EncodedImage.index` and `EncodedImage.blend`."""
        base = np.arange(self.config.features_per_tile, dtype=np.int32)
        fine = np.zeros((int(self._is_anyres), 0), np.int32)  # nothing, or nothing but the end of a row
        if self._cut(images):
            resolution = anyres.select_resolution(height, width, self.config.grid_pinpoints)
            vision = self.config.vision
            fine = anyres.feature_grid(height, width, resolution, vision.image_size, vision.grid_size)
        if self.config.max_tiles is None:
            return anyres.in_lines(base, fine, NEWLINE), None
        shape = anyres.shrunk_shape(*fine.shape, self.config.vision.grid_size, self.config.max_tiles)
        near, four, weights = anyres.shrink(fine, shape)
        blend = [anyres.in_lines(a, b, 0) for a, b in zip(anyres.unmixed(base), (four, weights))]
        return anyres.in_lines(base, near, NEWLINE), (blend[0], blend[1])

    def encode(
        self, images: Sequence[Image.Image], names: Sequence[str], tokens: Mapping[str, str]
    ) -> list[EncodedImage]:
        """The images of one prompt; see `ImageLayout`."""
        encoded = []
        for image, name in zip(images, names, strict=True):
            tiles = self.tiles(image, name, images=len(images))
            index, blend = self._features(image.height, image.width, len(images))
            features = len(tiles) * self.config.features_per_tile
            encoded.append(EncodedImage(tiles, index, features, tokens["image_token"] * len(index), blend=blend))
        return encoded

    @property
    def blends(self) -> bool:
        """Whether maps of features may be shrunk; see `BlendingLayout`."""
        return self.config.max_tiles is not None

    @property
    def _video_grid(self) -> int:
        """Visual tokens along one side of a frame."""
        return math.ceil(self.config.vision.grid_size / 2)

    def encode_video(self, video: Video, name: str, tokens: Mapping[str, str]) -> EncodedImage:
        """A video of a prompt, closed by a single row break; see `VideoLayout`."""
        assert self.videos is not None
        tiles = np.stack([self.videos.tile(frame, name) for frame in video.load(name)])
        count, side = self.config.features_per_tile, self.config.vision.grid_size
        grid = np.arange(count, dtype=np.int32).reshape(side, side)
        near, four, weights = anyres.shrink(grid, (self._video_grid,) * 2)
        first = count * np.arange(len(tiles), dtype=np.int32)[:, None]
        index = np.append((near.reshape(1, -1) + first).reshape(-1), np.int32(NEWLINE))
        four = (four.reshape(1, -1, 4) + first[..., None]).reshape(-1, 4)
        blend = tuple(np.pad(x, ((0, 1), (0, 0))) for x in (four, np.tile(weights.reshape(-1, 4), (len(tiles), 1))))
        features, text = count * len(tiles), tokens["video_token"] * len(index)
        return EncodedImage(tiles, index, features, text, blend=(blend[0], blend[1]), moving=True)

    def token_regions(self, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Which part of its image each visual token stands for; see `ImageLayout`."""
        transform = self.transform if self._cut(len(shapes)) else self._whole
        return [token_regions(self.config, transform, *shape, self._cut(len(shapes))) for shape in shapes]

    def video_regions(self, frames: int, height: int, width: int) -> list[tuple[int, np.ndarray]]:
        """Which part of its frame each visual token of a video stands for; see `VideoLayout`."""
        boxes = cells((self._video_grid,) * 2, (0.0, 0.0, float(width), float(height))).astype(np.float32)
        found = [(number, boxes) for number in range(frames)]
        return [*found[:-1], (frames - 1, np.pad(boxes, ((0, 1), (0, 0)), constant_values=np.nan))]  # a row break

    def files(self, image_token: str) -> dict[str, dict[str, Any]]:
        """What transformers reads a processor from; see `ImageLayout`."""
        config = self.config
        kind = {"processor_class": _PROCESSORS[config.model_type]}
        crop = image_processor(config) not in IMAGE_PROCESSORS or self.transform.do_center_crop
        values = self.transform.as_dict(crop=crop) | {"image_processor_type": image_processor(config)}
        if self.transform.pad_to_square:
            values |= {"image_processor_type": _OWN, "do_pad": True}
        if self._is_anyres:
            values["image_grid_pinpoints"] = [list(pair) for pair in config.grid_pinpoints]
        settings = {
            "image_token": image_token,
            # The class token, which the default strategy takes away again.
            "num_additional_image_tokens": 1 if config.vision_type == "clip_vision_model" else 0,
            "patch_size": config.vision.patch_size,
            "vision_feature_select_strategy": config.feature_select,
        }
        if config.max_tiles is not None:
            settings = {
                "image_token": image_token,
                "num_image_tokens": config.features_per_tile,
                "vision_aspect_ratio": f"anyres_max_{config.max_tiles}",
                "vision_feature_select_strategy": config.feature_select,
            }
        files = {"preprocessor_config.json": values | kind, "processor_config.json": settings | kind}
        if self.videos is not None:
            video = {"video_processor_type": "LlavaOnevisionVideoProcessor"} | kind
            files["video_preprocessor_config.json"] = self.videos.values() | video
        return files


def read_layout(config: LlavaConfig, settings: dict[str, Any], source: str) -> VisionLayout:
    """See `Family.read_layout`."""
    # For LLaVA's own image processor `do_pad` means this; for LLaVA-NeXT's it concerns batching.
    own = str(settings.get("image_processor_type", "")).startswith(_OWN)
    kind = str(settings.get("image_processor_type") or image_processor(config))
    missing = next((v for name, v in IMAGE_PROCESSORS.items() if kind.startswith(name)), {})
    if missing:  # what CLIP's lacks is an error where a step needs it; of others the class fills it in
        settings = missing | settings_given(settings)
    if missing and settings.get("crop_size") is None:  # tiles are of `size` then
        size = settings["size"]
        settings["crop_size"] = size.get("shortest_edge", size) if isinstance(size, dict) else size
    transform = ImageTransform.from_dict(settings, source, square="do_pad" if own else None)
    layout = VisionLayout(agree_on_pinpoints(config, settings.get("image_grid_pinpoints")), transform)
    side = config.vision.image_size
    return read_videos(layout, settings | {"size": {"height": side, "width": side}}, source)


def read_videos(layout: VisionLayout, settings: dict[str, Any], source: str) -> VisionLayout:
    """`layout` with what the settings of a video processor say; see `Family.read_videos`.

    Where LLaVA-OneVision's do not say which frames are taken, 32 are, as its authors' evaluation has it.
    """
    if layout.config.model_type != "llava_onevision":
        return layout
    sampling = SegmentSampling(num_frames=32, min_frames=2)
    side = layout.config.vision.image_size
    return dataclasses.replace(layout, videos=read_frame_tiles(settings, source, side, _VIDEO_DEFAULTS, sampling))


def image_processor(config: LlavaConfig) -> str:
    """The class of transformers that makes the tiles of such a model."""
    if config.model_type == "llava":
        return "CLIPImageProcessor" if config.vision_type == "clip_vision_model" else "SiglipImageProcessor"
    return _PROCESSORS[config.model_type].replace("Processor", "ImageProcessor")


def agree_on_pinpoints(config: LlavaConfig, of_processor: Any) -> LlavaConfig:
    """`config` with its resolutions in the image processor's order, in which the first of equally good ones wins.

    Raises CheckpointError if the two name different resolutions: the visual tokens would not fit the features.
    """
    if not config.grid_pinpoints or of_processor is None:
        return config
    pairs = isinstance(of_processor, list) and len(of_processor) <= PINPOINTS
    if pairs and all(isinstance(pair, list) and len(pair) == 2 for pair in of_processor):
        pinpoints = tuple((height, width) for height, width in of_processor)
        of_model = config.grid_pinpoints
        if all(pair in of_model for pair in pinpoints) and all(pair in pinpoints for pair in of_model):
            return dataclasses.replace(config, grid_pinpoints=pinpoints)
    raise CheckpointError(
        f"image_grid_pinpoints differ: config.json has {config.grid_pinpoints}, the image processor "
        f"{shorten(of_processor)}; make them agree"
    )
