"""How images of any size and videos become patches, and their features visual tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.models.families.family import EncodedImage
from vlcache_jax.models.families.qwen_vl.areas import read_areas
from vlcache_jax.models.families.qwen_vl.config import QwenVLConfig
from vlcache_jax.models.families.qwen_vl.videos import VideoRules
from vlcache_jax.models.images.frame_sampling import FrameSampling
from vlcache_jax.models.images.patches import cut_patches, patch_order
from vlcache_jax.models.images.repeats import without_repeats
from vlcache_jax.models.images.smart_resize import smart_resize
from vlcache_jax.models.images.tiles import cells as grid_cells
from vlcache_jax.models.images.transform import ImageTransform, resize
from vlcache_jax.models.images.video import Video

_PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}


@dataclasses.dataclass(frozen=True)
class PatchLayout:
    """Sizes of images in front of the tower, and their patches in its order.

    Attributes:
      config: of the model.
      transform: the filter of resizing, and how pixels are normalised.
      min_pixels, max_pixels: least and greatest area of a resized image.
      max_tokens: visual tokens of an image at most, where the user has set limits. Those of a checkpoint are not kept
        by images so long that they become a single row, as in transformers.
      pixel_prune: leave out patches that their neighbours show, see `without_repeats`: the threshold; None leaves out
        none. Of still images.
      videos: the same of videos.
    """

    config: QwenVLConfig
    transform: ImageTransform
    min_pixels: int
    max_pixels: int
    videos: VideoRules
    max_tokens: int | None = None
    pixel_prune: float | None = None

    @property
    def sampling(self) -> FrameSampling:
        """Which frames of a video file are taken."""
        return self.videos.sampling

    def grid(self, height: int, width: int, name: str = "the image") -> tuple[int, int]:
        """Rows and columns of patches of an image of this shape. Raises InputError, naming it, if it is too long."""
        patch, factor = self.config.vision.patch_size, self._token_side
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        rows, columns = smart_resize(height, width, factor=factor, **limits, name=name)
        tokens = rows * columns // factor**2
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise InputError(
                f"{name} is {width} x {height} pixels, so long that it would have {tokens} visual tokens, where "
                f"{self.max_tokens} are allowed: crop it first, or allow more"
            )
        return rows // patch, columns // patch

    def limited(self, limits: Mapping[str, Any]) -> "PatchLayout":
        """The same with other sizes of images; see `SizedLayout`."""
        size = limits.get("size")
        if size is not None and (not isinstance(size, dict) or not set(size) <= {"shortest_edge", "longest_edge"}):
            raise InputError(f"size = {shorten(size)}: give shortest_edge and longest_edge, which are areas in pixels")
        prune = limits.get("pixel_prune")
        if prune is not None and (isinstance(prune, bool) or not isinstance(prune, int | float) or not 0 <= prune < 1):
            raise InputError(f"pixel_prune = {shorten(prune)}: give the threshold, 0 for equal patches only, below 1")
        try:
            areas = self.min_pixels, self.max_pixels
            least, most = read_areas(limits, "the limits of images", areas, self._token_side**2)
        except CheckpointError as error:
            raise InputError(str(error)) from error
        most_tokens = most // self._token_side**2 if set(limits) - {"pixel_prune"} else self.max_tokens
        return dataclasses.replace(self, min_pixels=least, max_pixels=most, max_tokens=most_tokens, pixel_prune=prune)

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
            whole = EncodedImage(patches, order.index, len(order.index), text, cells)
            if self.pixel_prune is not None:
                whole = without_repeats(whole, vision.merge_size, tokens["image_token"], self.pixel_prune)
            encoded.append(whole)
        return encoded

    def encode_video(self, video: Video, name: str, tokens: Mapping[str, str]) -> EncodedImage:
        """A video of a prompt; see `VideoLayout`."""
        vision, rules, times = self.config.vision, self.videos, video.times
        frames, pair = video.load(name), vision.frame_pair
        height, width = frames[0].height, frames[0].width
        shape = rules.frame_shape(len(frames), height, width, pair, self._token_side, name)
        pixels = [np.asarray(resize(frame, shape, rules.transform.resample, name)) for frame in frames]
        pixels += pixels[-1:] * (-len(pixels) % pair)
        rows, columns = (side // vision.patch_size for side in shape)
        order = patch_order(rows, columns, merge=vision.merge_size, window=vision.window)
        patches, index, cells = [], [], []
        for number, first in enumerate(range(0, len(pixels), pair)):
            patches.append(cut_patches(np.stack(pixels[first : first + pair]), order.cells, vision.patch_size))
            index.append(order.index + number * len(order.index))
            frame = np.full((len(order.cells), 2), (number, self._time(number, times[first] - times[0])), np.int32)
            cells.append(np.concatenate([frame, order.cells], axis=1))
        text = rules.text(times, pair, len(order.index), tokens)
        around = ("", "")
        if rules.timestamps and rules.wrapper == "v4":
            around = tokens["vision_start_token"], tokens["vision_end_token"]
        whole = np.concatenate(index)
        made = np.concatenate(patches), whole, len(whole), text, np.concatenate(cells)
        return EncodedImage(*made, around=around, moving=True)

    def _time(self, number: int, seconds: float) -> int:
        """Where a pair of frames stands on the time axis of its video."""
        if self.videos.timestamps:
            return 0
        if self.config.tokens_per_second is None:
            return number
        return int(self.config.tokens_per_second * seconds + 1e-4)  # 0.999999, of a division by fps, is 1

    def normalised(self, rows: Sequence[Sequence[EncodedImage]], tiles: int) -> np.ndarray:
        """f32 [rows, patches, 3 * patch_size²], or of each patch a pair of frames if there are videos."""
        still = 3 * self.config.vision.patch_size**2
        channels = max((image.pixels.shape[1] for images in rows for image in images), default=still)
        found = np.zeros((len(rows), tiles, channels), np.float32)
        for row, images in enumerate(rows):
            start = 0
            for image in images:
                n, transform = len(image.pixels), self.videos.transform if image.moving else self.transform
                colours = image.pixels.reshape(n, 3, -1).swapaxes(1, 2)
                pixels = transform.normalise(colours).swapaxes(1, 2)
                repeats = channels // image.pixels.shape[1]  # of a still image, all frames are equal
                found[row, start : start + n] = np.tile(pixels, (1, 1, repeats)).reshape(n, -1)
                start += n
        return found

    def token_regions(self, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Which part of its image each visual token stands for; see `ImageLayout`."""
        merge, found = self.config.vision.merge_size, []
        for height, width in shapes:
            rows, columns = self.grid(height, width)
            found.append(_regions((rows // merge, columns // merge), height, width))
        return found

    def video_regions(self, frames: int, height: int, width: int) -> list[tuple[int, np.ndarray]]:
        """Which part of its frame each visual token of a video stands for; see `VideoLayout`."""
        pair, side = self.config.vision.frame_pair, self._token_side
        rows, columns = self.videos.frame_shape(frames, height, width, pair, side, "the video")
        boxes = _regions((rows // side, columns // side), height, width)
        return [(first, boxes) for first in range(0, frames, pair)]

    def files(self, image_token: str) -> dict[str, dict[str, Any]]:
        """What transformers reads a processor from; see `ImageLayout`."""
        kind, rules = {"processor_class": _PROCESSORS[self.config.model_type]}, self.videos
        video = self._processor_values(rules.transform, rules.min_pixels, rules.max_pixels) | {
            "cap_pixels_per_frame": rules.cap_pixels_per_frame,
            "fps": rules.sampling.fps,
            "max_frames": rules.sampling.max_frames,
            "min_frames": rules.sampling.min_frames,
            "video_processor_type": f"Qwen{3 if rules.of_all else 2}VLVideoProcessor",
        }
        image = self._processor_values(self.transform, self.min_pixels, self.max_pixels)
        return {
            "preprocessor_config.json": image | {"image_processor_type": "Qwen2VLImageProcessor"} | kind,
            "processor_config.json": {"image_token": image_token} | kind,
            "video_preprocessor_config.json": video | kind,
        }

    def _processor_values(self, transform: ImageTransform, least: int, most: int) -> dict[str, Any]:
        vision = self.config.vision
        return transform.as_dict(crop=False) | {
            "merge_size": vision.merge_size,
            "patch_size": vision.patch_size,
            "size": {"longest_edge": most, "shortest_edge": least},
            "temporal_patch_size": vision.frame_pair,
        }


def _regions(grid: tuple[int, int], height: int, width: int) -> np.ndarray:
    """The cells of a grid over an image of this shape, row by row: f32 [cells, 4]."""
    return grid_cells(grid, (0.0, 0.0, float(width), float(height))).astype(np.float32)
