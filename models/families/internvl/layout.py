"""How an image becomes tiles: a grid of nearly its shape, and a thumbnail (https://arxiv.org/abs/2404.16821)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.files.limits import TILES, Range
from vlcache_jax.models.families.frame_tiles import read_frame_tiles
from vlcache_jax.models.families.internvl.config import InternVLConfig
from vlcache_jax.models.families.tile_layout import TileLayout
from vlcache_jax.models.images.frame_sampling import SegmentSampling
from vlcache_jax.models.images.tiles import split
from vlcache_jax.models.images.transform import ImageTransform, resize, settings_given
from vlcache_jax.models.images.video import Video
from vlcache_jax.models.io.section import Section

# What the image processor's class fills in, where it differs from CLIP's.
_DEFAULTS = {"do_center_crop": False, "size": {"height": 384, "width": 384}, "min_patches": 1, "max_patches": 12}

_VIDEO_DEFAULTS = {"size": {"height": 384, "width": 384}}


@dataclasses.dataclass(frozen=True)
class InternLayout(TileLayout):
    """Between `min_tiles` and `max_tiles` tiles, of the grid that is nearest to an image in its aspect ratio."""

    min_tiles: int = 1
    max_tiles: int = 12

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns; of equally near grids the largest of which the image fills more than half.

        The order of comparison and its rounding are those of transformers, which decide how many tokens there are.
        """
        sides = range(1, self.max_tiles + 1)
        shapes = [(rows, columns) for columns in sides for rows in sides]
        shapes = [shape for shape in shapes if self.min_tiles <= shape[0] * shape[1] <= self.max_tiles]
        best, least = (1, 1), float("inf")
        for rows, columns in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
            difference = abs(width / height - columns / rows)
            filled = height * width > 0.5 * self.config.vision.image_size**2 * rows * columns
            if difference < least or (difference == least and filled):
                best, least = (rows, columns), difference
        return best

    def tiles(self, image: Image.Image, name: str) -> np.ndarray:
        """The tiles of an RGB image before normalisation; see `TileLayout`."""
        side = self.config.vision.image_size
        rows, columns = self.grid(image.height, image.width)
        whole = self.transform.apply(image, name)[None]
        if rows * columns == 1:
            return whole
        canvas = resize(image, (rows * side, columns * side), self.transform.resample, name)
        return np.concatenate([split(np.asarray(canvas), side), whole])

    def text(self, rows: int, columns: int, tokens: Mapping[str, str]) -> str:
        """All visual tokens of an image between two others; see `TileLayout`."""
        tiles = rows * columns + (1 if rows * columns > 1 else 0)
        visual = tokens["image_token"] * (tiles * self.config.token_grid**2)
        return f"{tokens['start_image_token']}{visual}{tokens['end_image_token']}"

    def video_text(self, video: Video, name: str, tokens: Mapping[str, str]) -> str:
        """Each frame as a single tile behind its number; see `TileLayout`."""
        frame = self.text(1, 1, tokens)
        return "\n".join(f"Frame{number}: {frame}" for number in range(1, len(video.times) + 1))

    def files(self, image_token: str) -> dict[str, dict[str, Any]]:
        """What transformers reads a processor from; see `ImageLayout`."""
        del image_token  # the tokenizer names it
        kind = {"processor_class": "InternVLProcessor"}
        values = self.transform.as_dict(crop=False)
        tiling = {"min_patches": self.min_tiles, "max_patches": self.max_tiles}
        files = {
            "preprocessor_config.json": values | tiling | {"image_processor_type": "GotOcr2ImageProcessor"} | kind,
            "processor_config.json": {"image_seq_length": self.config.token_grid**2} | kind,
        }
        if self.videos is not None:
            video = {"video_processor_type": "InternVLVideoProcessor"} | kind
            files["video_preprocessor_config.json"] = self.videos.values() | video
        return files


def read_layout(config: InternVLConfig, settings: dict[str, Any], source: str) -> InternLayout:
    """See `Family.read_layout`.

    `crop_to_patches` is not asked: InternVL's processor cuts images whatever that of its images says.
    """
    given = _DEFAULTS | settings_given(settings)
    section = Section(Path(source), "", given, {})
    least = section.integer("min_patches", Range(1, TILES))
    most = section.integer("max_patches", Range(least, TILES))
    layout = InternLayout(config, ImageTransform.from_dict(given, source), least, most)
    return read_videos(layout, settings, source)


def read_videos(layout: InternLayout, settings: dict[str, Any], source: str) -> InternLayout:
    """`layout` with what the settings of a video processor say; see `Family.read_videos`.

    Where they do not say which frames are taken, the authors' own program takes eight.
    """
    sampling = SegmentSampling(num_frames=8, min_frames=2, middle=True)
    side = layout.config.vision.image_size
    return dataclasses.replace(layout, videos=read_frame_tiles(settings, source, side, _VIDEO_DEFAULTS, sampling))
