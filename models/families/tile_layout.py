"""Layouts that cut an image into a grid of square tiles, and show the whole of it behind them; a frame is one tile."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.families.family import EncodedImage
from vlcache_jax.models.families.frame_tiles import FrameTiles
from vlcache_jax.models.images.frame_sampling import FrameSampling
from vlcache_jax.models.images.tiles import cells
from vlcache_jax.models.images.transform import ImageTransform, stacked_tiles
from vlcache_jax.models.images.video import Video


@dataclasses.dataclass(frozen=True)
class TileLayout:
    """Tiles row by row, the whole image last; or that alone. A tile yields `config.token_grid` squared visual tokens.

    A family's own class says how an image is cut, what stands for it in a prompt, and writes its files. With
    `videos`, it says what stands for a video, too.

    Raises CheckpointError if the image processor's tiles would not fit the vision tower.
    """

    config: Any
    transform: ImageTransform
    videos: FrameTiles | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        side = self.config.vision.image_size
        for shape in ((1000, 500), (500, 1000), (10, 10)):
            made = self.transform.output_shape(*shape)
            if made != (side, side):
                raise CheckpointError(
                    f"the image processor makes images of {made} pixels, but the vision tower takes {(side, side)}: "
                    "correct size"
                )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles of an image of this shape; (1, 1) if it is seen as a whole alone."""
        raise NotImplementedError

    def tiles(self, image: Image.Image, name: str) -> np.ndarray:
        """The tiles of an RGB image before normalisation, u8 [tiles, side, side, 3]. Raises InputError."""
        raise NotImplementedError

    def text(self, rows: int, columns: int, tokens: Mapping[str, str]) -> str:
        """What stands in a prompt for an image of so many rows and columns; see `EncodedImage.text`."""
        raise NotImplementedError

    def video_text(self, video: Video, name: str, tokens: Mapping[str, str]) -> str:
        """What stands in a prompt for a video, the visual tokens of each of its frames. Raises InputError."""
        raise NotImplementedError

    @property
    def sampling(self) -> FrameSampling | None:
        """Which frames of a video file are taken; see `VideoLayout`."""
        return None if self.videos is None else self.videos.sampling

    def encode_video(self, video: Video, name: str, tokens: Mapping[str, str]) -> EncodedImage:
        """A video of a prompt; see `VideoLayout`."""
        assert self.videos is not None
        tiles = np.stack([self.videos.tile(frame, name) for frame in video.load(name)])
        features = len(tiles) * self.config.token_grid**2
        text = self.video_text(video, name, tokens)
        return EncodedImage(tiles, np.arange(features, dtype=np.int32), features, text, moving=True)

    def encode(
        self, images: Sequence[Image.Image], names: Sequence[str], tokens: Mapping[str, str]
    ) -> list[EncodedImage]:
        """The images of one prompt; see `ImageLayout`."""
        encoded = []
        for image, name in zip(images, names, strict=True):
            tiles, text = self.tiles(image, name), self.text(*self.grid(image.height, image.width), tokens)
            features = len(tiles) * self.config.token_grid**2
            encoded.append(EncodedImage(tiles, np.arange(features, dtype=np.int32), features, text))
        return encoded

    def normalised(self, rows: Sequence[Sequence[EncodedImage]], tiles: int) -> np.ndarray:
        """f32 [rows, tiles, image_size, image_size, 3]; see `ImageLayout`."""
        side = self.config.vision.image_size
        return stacked_tiles([[(self._transform(image), image.pixels) for image in row] for row in rows], tiles, side)

    def _transform(self, image: EncodedImage) -> ImageTransform:
        return self.videos.transform if image.moving and self.videos else self.transform

    def token_regions(self, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Which part of its image each visual token stands for; see `ImageLayout`."""
        grid = (self.config.token_grid,) * 2
        regions = []
        for height, width in shapes:
            whole = (0.0, 0.0, float(width), float(height))
            rows, columns = self.grid(height, width)
            boxes = [tuple(box) for box in cells((rows, columns), whole)] if rows * columns > 1 else []
            regions.append(np.concatenate([cells(grid, box) for box in (*boxes, whole)]).astype(np.float32))
        return regions

    def video_regions(self, frames: int, height: int, width: int) -> list[tuple[int, np.ndarray]]:
        """Which part of its frame each visual token of a video stands for; see `VideoLayout`."""
        boxes = cells((self.config.token_grid,) * 2, (0.0, 0.0, float(width), float(height))).astype(np.float32)
        return [(number, boxes) for number in range(frames)]
