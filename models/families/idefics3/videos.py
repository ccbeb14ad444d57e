"""Videos of SmolVLM2: one tile a frame, behind the time at which it is seen."""

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.files.limits import IMAGE_SIDE
from vlcache_jax.models.families.frame_tiles import FrameTiles, read_frame_tiles
from vlcache_jax.models.families.idefics3.sizes import resized_shape
from vlcache_jax.models.images.frame_sampling import FrameSampling, read_sampling
from vlcache_jax.models.images.transform import resize
from vlcache_jax.models.images.video import Video

_MOST = 999  # frames; what `in_words` can say
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InnerSampling(FrameSampling):
    """`fps` frames a second, at most `max_frames`; of long videos none from the first second and the last.

    The authors' rule, as transformers has it, but for two frames at least.

    Attributes:
      skipped: seconds that are left out at either end, of videos longer than both and `max_frames` times `fps`.
    """

    fps: float | None = 1.0
    min_frames: int = 2
    max_frames: int = 64
    skipped: float = 1.0

    def indices(self, count: int, fps: float) -> np.ndarray:
        """i64 [frames], see `FrameSampling.indices`."""
        most = self.max_frames if self.num_frames is None else self.num_frames
        first, last, duration = 0, count - 1, count / fps
        if self.fps is not None and duration - 2 * self.skipped > most * self.fps:
            inner = int(self.skipped * fps), min(int(count - self.skipped * fps), count - 1)
            first, last = inner if inner[0] < inner[1] else (first, last)
        return np.unique(np.linspace(first, last, self.wanted(count, fps), dtype=np.int64))

    def _rate(self, count: int, fps: float) -> int:
        return round(count / fps * (self.fps or 0))


@dataclasses.dataclass(frozen=True)
class ResizedFrames(FrameTiles):
    """Frames whose longer side is brought to `longest_edge` before they are stretched to a tile."""

    longest_edge: int

    def tile(self, frame: Image.Image, name: str) -> np.ndarray:
        shape = resized_shape(frame.height, frame.width, self.longest_edge)
        return super().tile(resize(frame, shape, self.transform.resample, name), name)

    def values(self) -> dict[str, Any]:
        """See `FrameTiles`; transformers calls the most frames `num_frames`."""
        side, most = self.transform.output_shape(1, 1)[0], self.sampling.max_frames
        sizes = {"size": {"longest_edge": self.longest_edge}, "max_image_size": {"longest_edge": side}}
        return super().values() | sizes | {"num_frames": most}


def read_videos(settings: Mapping[str, Any], source: str, side: int, defaults: Mapping[str, Any]) -> ResizedFrames:
    """The rules that a processor's settings ask for; SmolVLM2's own have them under `video_sampling`.

    Raises CheckpointError if they are malformed or do not fit the model.
    """
    own = settings.get("video_sampling")
    if own is not None and not isinstance(own, dict):
        raise CheckpointError(f"{source}: video_sampling = {shorten(own)} is not an object")
    named = own or settings
    size = named.get("video_size", settings.get("size", defaults["size"]))
    longest = size.get("longest_edge") if isinstance(size, dict) else None
    if type(longest) is not int or longest not in IMAGE_SIDE:
        raise CheckpointError(
            f'{source}: the size of videos is {shorten(size)}: expected {{"longest_edge": a whole number {IMAGE_SIDE}}}'
        )
    numbers = {"fps": named.get("fps"), "max_frames": named.get("max_frames", named.get("num_frames"))}
    tiles = read_frame_tiles(
        {**settings, "size": {"height": side, "width": side}, "fps": None}, source, side, defaults, InnerSampling()
    )
    return ResizedFrames(tiles.transform, read_sampling(tiles.sampling, numbers, source), longest)


def video_text(video: Video, frame: str, name: str) -> str:
    """What stands in a prompt for a video, with the text of a single image for each `frame`.

    Raises InputError, naming the video, if it has more frames than can be said.
    """
    count = len(video.times)
    if count > _MOST:
        raise InputError(f"{name} has {count} frames, at most {_MOST} are supported: sample fewer")
    duration = datetime.timedelta(seconds=int(video.times[-1] if video.duration is None else video.duration))
    lines = [f"You are provided the following series of {in_words(count)} frames from a {duration} [H:MM:SS] video.\n"]
    for seconds in map(int, video.times):
        lines.append(f"\nFrame from {seconds // 60:02d}:{seconds % 60:02d}:{frame}")
    return "".join(lines) + "\n\n"


def in_words(number: int) -> str:
    """A number from 0 to 999 in English, as SmolVLM2 is told how many frames a video has.

    Example:
      >>> in_words(42), in_words(164)
      ('forty-two', 'one hundred and sixty-four')
    """
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_SMALL[rest]}" if rest else "")
    hundreds, rest = divmod(number, 100)
    return f"{_SMALL[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")
