"""How an image becomes tiles, and the text between them that says where each of them lies."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.files.limits import IMAGE_SIDE
from vlcache_jax.models.families.idefics3.config import NAMES, Idefics3Config
from vlcache_jax.models.families.idefics3.sizes import resized_shape
from vlcache_jax.models.families.idefics3.videos import read_videos, video_text
from vlcache_jax.models.families.tile_layout import TileLayout
from vlcache_jax.models.images.tiles import split
from vlcache_jax.models.images.transform import ImageTransform, resize, settings_given
from vlcache_jax.models.images.video import Video
from vlcache_jax.models.io.section import Section

_DEFAULTS: dict[str, Any] = {
    "do_center_crop": False,
    "do_image_splitting": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "max_image_size": {"longest_edge": 364},
    "resample": 1,
    "size": {"longest_edge": 4 * 364},
}  # what the image processor's class fills in, where it differs from CLIP's


@dataclasses.dataclass(frozen=True)
class MarkedLayout(TileLayout):
    """An image's longer side becomes `longest_edge`; then it is stretched to whole tiles and cut, with `splitting`."""

    longest_edge: int = 1456
    splitting: bool = True

    def _canvas(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of whole tiles, for an image of `resized_shape`."""
        side, aspect = self.config.vision.image_size, width / height

        def whole(length: float) -> int:
            return math.ceil(length / side) * side

        if width >= height:
            return whole(int(whole(width) / aspect)), whole(width)
        return whole(height), whole(int(whole(height) * aspect))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles; see `TileLayout`."""
        if not self.splitting:
            return 1, 1
        side = self.config.vision.image_size
        height, width = self._canvas(*resized_shape(height, width, self.longest_edge))
        return max(1, height // side), max(1, width // side)

    def tiles(self, image: Image.Image, name: str) -> np.ndarray:
        """The tiles of an RGB image before normalisation; see `TileLayout`."""
        rows, columns = self.grid(image.height, image.width)
        resample, side = self.transform.resample, self.config.vision.image_size
        image = resize(image, resized_shape(image.height, image.width, self.longest_edge), resample, name)
        if self.splitting:
            image = resize(image, self._canvas(image.height, image.width), resample, name)
        whole = self.transform.apply(image, name)[None]
        return whole if rows * columns == 1 else np.concatenate([split(np.asarray(image), side), whole])

    def text(self, rows: int, columns: int, tokens: Mapping[str, str]) -> str:
        """The visual tokens of each tile behind a mark of its row and column; see `TileLayout`."""
        around, visual = tokens["fake_image_token"], tokens["image_token"] * self.config.token_grid**2
        whole = f"{around}{tokens['global_image_token']}{visual}{around}"
        if rows * columns == 1:
            return whole
        marks = [[f"{around}<row_{r + 1}_col_{c + 1}>{visual}" for c in range(columns)] for r in range(rows)]
        return "".join("".join(row) + "\n" for row in marks) + f"\n{whole}"

    def video_text(self, video: Video, name: str, tokens: Mapping[str, str]) -> str:
        """The text of a single tile for each frame, behind its time; see `TileLayout`."""
        return video_text(video, self.text(1, 1, tokens), name)

    def files(self, image_token: str) -> dict[str, dict[str, Any]]:
        """What transformers reads a processor from; see `ImageLayout`."""
        del image_token  # the tokenizer names it
        name = NAMES[self.config.model_type]
        kind = {"processor_class": f"{name}Processor"}
        values = self.transform.as_dict(crop=False)
        tiling = {
            "do_image_splitting": self.splitting,
            "do_pad": True,
            "image_processor_type": f"{name}ImageProcessor",
            "max_image_size": {"longest_edge": self.config.vision.image_size},
            "size": {"longest_edge": self.longest_edge},
        }
        files = {
            "preprocessor_config.json": values | tiling | kind,
            "processor_config.json": {"image_seq_len": self.config.token_grid**2} | kind,
        }
        if self.videos is None:
            return files
        video = self.videos.values() | {"video_processor_type": f"{name}VideoProcessor"} | kind
        return files | {"video_preprocessor_config.json": video}


def read_layout(config: Idefics3Config, settings: dict[str, Any], source: str) -> MarkedLayout:
    """See `Family.read_layout`."""
    given = _DEFAULTS | settings_given(settings)
    section = Section(Path(source), "", given, {})
    edges = []
    for key in ("size", "max_image_size"):
        value = given[key].get("longest_edge") if isinstance(given[key], dict) else None
        if type(value) is not int or value not in IMAGE_SIDE:
            raise section.error(key, given[key], f'{{"longest_edge": a whole number {IMAGE_SIDE}}}')
        edges.append(value)
    side = config.vision.image_size
    if edges[1] != side:
        raise CheckpointError(
            f"{source}: max_image_size is {shorten(given['max_image_size'])}, but the vision tower takes tiles of "
            f"{side} pixels: make the two agree"
        )
    given["size"] = {"height": side, "width": side}
    splitting = section.flag("do_image_splitting", True)
    layout = MarkedLayout(config, ImageTransform.from_dict(given, source), edges[0], splitting)
    return with_videos(layout, settings, source)


def with_videos(layout: MarkedLayout, settings: dict[str, Any], source: str) -> MarkedLayout:
    """`layout` with what the settings of a video processor say; see `Family.read_videos`."""
    if layout.config.model_type != "smolvlm":
        return layout
    side = layout.config.vision.image_size
    return dataclasses.replace(layout, videos=read_videos(settings, source, side, _DEFAULTS))
