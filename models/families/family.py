"""What a family of models offers to the rest of the library, which knows no family by name."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vlcache_jax.errors import InputError
from vlcache_jax.inputs import Batch
from vlcache_jax.models.coding import WeightCoding
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.images.frame_sampling import FrameSampling
from vlcache_jax.models.images.video import Video
from vlcache_jax.models.io.files import CheckpointFolder
from vlcache_jax.models.io.rules import WeightRules
from vlcache_jax.models.io.section import Section
from vlcache_jax.typing import Params, VisionLanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is made of; a family's has its tower and more besides.

    Attributes:
      model_type: as in `config.json`; one of its family's `model_types`.
      decoder: the text part.
      image_token_id: stands in the tokens of a prompt for every visual token.
      bos_token_id: the beginning of a sequence.
      pad_token_id: padding.
      eos_token_ids: what ends an answer.
    """

    model_type: str
    decoder: DecoderConfig
    image_token_id: int
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


class FamilyModel(VisionLanguageModel, Protocol):
    """A model of a family: what the core asks of one, and its shapes."""

    @property
    def config(self) -> Any:
        """Its `ModelConfig`."""

    @property
    def dtype(self) -> Any:
        """Of the computation."""

    @property
    def layout(self) -> str:
        """How the decoder's weights lie, a key of `decoder.layout.LAYOUTS`; a field, for `dataclasses.replace`."""

    @property
    def weights(self) -> WeightCoding | None:
        """How the weights of the decoder's projections are coded."""

    def abstract_params(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is computed."""

    def abstract_batch(self, rows: int, length: int, tiles: int) -> Batch:
        """A batch of `jax.ShapeDtypeStruct`s: `rows` prompts of `length` tokens, each with `tiles` tiles of images."""


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An image or a video of a prompt.

    Attributes:
      pixels: u8 [tiles or patches, ...], before they are normalised.
      index: i32 [visual tokens], `Batch.vision_index` of its tokens, features counted from the image's first.
      features: how many features the vision tower yields for it.
      text: what stands in the prompt in its place: the image token once for every visual token, and whatever the family
        writes around and between them.
      cells: i32 [patches, 4], `Batch.cells` of its patches, frames counted from the image's first; None of tiles.
      blend: (i32 [visual tokens, 4], f32 [visual tokens, 4]) for `Batch.blend_index` and `blend_weights`, features
        counted as in `index`.
      around: what is taken away before and behind the token that stands for it, where the prompt has both.
      moving: whether it is a video.
    """

    pixels: np.ndarray
    index: np.ndarray
    features: int
    text: str
    cells: np.ndarray | None = None
    blend: tuple[np.ndarray, np.ndarray] | None = None
    around: tuple[str, str] = ("", "")
    moving: bool = False


class ImageLayout(Protocol):
    """How the images of a prompt become pixels and visual tokens. Everything is numpy, on the host."""

    @property
    def config(self) -> Any:
        """The `ModelConfig` of the model that it serves."""

    def encode(
        self, images: Sequence[Image.Image], names: Sequence[str], tokens: Mapping[str, str]
    ) -> list[EncodedImage]:
        """All images of one prompt, in RGB. Raises InputError, naming an image that cannot be used.

        `tokens` are the checkpoint's special tokens by name; "image_token" is the text of a visual token.
        """

    def normalised(self, rows: Sequence[Sequence[EncodedImage]], tiles: int) -> np.ndarray:
        """`Batch.pixels`, f32 [rows, tiles, ...], of the images of all prompts, each padded with zeros to `tiles`."""

    def token_regions(self, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Which part of its image each visual token stands for, for the images of one prompt.

        Args:
          shapes: (height, width) of each image as `load_image` gives it, in pixels.

        Returns:
          For each image f32 [visual tokens, 4]: left, top, right, bottom in its pixels, in the order of the prompt; NaN
          for tokens without a place. Regions may overlap, and reach beyond the image where it was padded.
        """

    def files(self, image_token: str) -> dict[str, dict[str, Any]]:
        """`preprocessor_config.json` and `processor_config.json`, both with a `processor_class`, for transformers.

        `image_token` is the text of a visual token.
        """


@runtime_checkable
class VideoLayout(ImageLayout, Protocol):
    """The layout of a family that takes videos; its special token is the "video_token"."""

    @property
    def sampling(self) -> FrameSampling | None:
        """Which frames of a video file are taken; None: this model of the family takes no videos."""

    def encode_video(self, video: Video, name: str, tokens: Mapping[str, str]) -> EncodedImage:
        """A video of a prompt. Raises InputError, naming it, if it cannot be used; `tokens` as in `encode`."""

    def video_regions(self, frames: int, height: int, width: int) -> list[tuple[int, np.ndarray]]:
        """Which part of its frame each visual token of a video stands for.

        Args:
          frames: how many there are.
          height, width: of each, in pixels.

        Returns:
          For each frame (or the first of several that share their tokens) its number and f32 [visual tokens, 4] as of
          `token_regions`; all of them together are the video's tokens in the order of the prompt.
        """


@runtime_checkable
class BlendingLayout(ImageLayout, Protocol):
    """The layout of a family in which visual tokens may be sums of several features."""

    @property
    def blends(self) -> bool:
        """Whether this model has such tokens. Then every batch with tiles has `Batch.blend_index`."""


@runtime_checkable
class SizedLayout(ImageLayout, Protocol):
    """The layout of a family whose images may be of any size, within limits that can be chosen."""

    @property
    def min_pixels(self) -> int:
        """The least area of a resized image."""

    @property
    def max_pixels(self) -> int:
        """The greatest."""

    def limited(self, limits: Mapping[str, Any]) -> ImageLayout:
        """The same with other limits: `max_image_tokens`, `min_pixels`, `max_pixels` and `size`, as given.

        Raises InputError for values that cannot be, or contradict each other.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models: how its checkpoints are read and written, and what runs them.

    Another one is a folder that makes such a value, and its name in `registry.py`.

    Attributes:
      model_types: of the `config.json`s that it reads.
      read_config: (folder, `config.json`) to the frozen, hashable config, with what `generation_config.json` says, if
        there is one. Raises CheckpointError for what is malformed or not supported, with the key and its value.
      config_values: (config, name of the weights' dtype) to the values of a `config.json`.
      model: (config, dtype, layout="stacked", weights=None) to the Flax module, see `FamilyModule`.
      weights: which tensor of a checkpoint is which parameter.
      read_layout: (config, settings of the image processor, name of their file) to the layout of images; its `config`
        may say more than that of `config.json` alone. Raises CheckpointError for settings that are malformed or do not
        fit the model.
      read_videos: (layout, settings of the video processor, name of their file) to the layout with what they say of
        videos, of a family that takes any. Raises CheckpointError.
      image_tiles: the most tiles (or patches) that an image becomes, for planning.
      token_patches: patches of a visual token, of a family whose images may be of any size (`SizedLayout`).
      placeholder: the name of the special token that stands for an image in a prompt.
      special_tokens: texts by their names, where neither tokenizer nor processor say; "image_token" is a visual token.
      presets: configs of published models, by their names.
      refused: model types that are taken for one of this family, and what to do about them.
    """

    model_types: tuple[str, ...]
    read_config: Callable[[CheckpointFolder, Section], Any]
    config_values: Callable[[Any, str], dict[str, Any]]
    model: Callable[..., Any]
    weights: WeightRules
    read_layout: Callable[[Any, dict[str, Any], str], ImageLayout]
    image_tiles: Callable[[Any], int]
    token_patches: Callable[[Any], int] | None = None
    read_videos: Callable[[Any, dict[str, Any], str], ImageLayout] | None = None
    placeholder: str = "image_token"
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"image_token": "<image>"})
    presets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)


def limited(layout: ImageLayout, limits: Mapping[str, Any]) -> ImageLayout:
    """A layout with other limits of images: see `Processor.from_folder`. Raises InputError."""
    unknown = sorted(set(limits) - {"max_image_tokens", "min_pixels", "max_pixels", "size", "pixel_prune"})
    if unknown:
        known = "max_image_tokens, min_pixels, max_pixels, size and pixel_prune"
        raise InputError(f"{unknown[0]!r} is no limit of images: the limits are {known}")
    if not isinstance(layout, SizedLayout):
        raise InputError("this model resizes images to sizes of its own: leave image_limits out (--max-image-tokens)")
    return layout.limited(limits)
