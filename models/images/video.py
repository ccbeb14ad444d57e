"""Videos as a prompt takes them: some frames, and the time of each."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import InputError
from vlcache_jax.models.images.frame_sampling import FrameSampling
from vlcache_jax.models.images.opening import ImageLike, load_image
from vlcache_jax.models.images.video_file import read_frames


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """Some frames of a video, all of which the model sees, with the time of each.

    It stands among the images of a prompt, and in the prompt the family's video token stands for it. Nothing is left
    out of it silently: `sampled` chooses frames, `from_file` does so while it reads.

    Attributes:
      frames: images (arrays, PIL images, paths; see `load_image`) of one size, or an array [frames, height, width, 3].
      times: seconds from the beginning of the video, one for each frame, rising.
      fps: instead of `times`, how many frames a second has.
      duration: seconds of the whole video, of which these may be a few frames; None: up to the last of them. Some
        models are told.

    Raises:
      InputError: fewer than two frames, neither or both of `times` and `fps`, times that do not fit the frames or do
        not rise, or a duration before the last of them.

    Example:
      >>> Video(np.zeros((3, 32, 32, 3), np.uint8), fps=2.0).times
      (0.0, 0.5, 1.0)
    """

    frames: Sequence[ImageLike] | np.ndarray
    times: Sequence[float] = ()
    fps: float | None = None
    duration: float | None = None

    def __post_init__(self) -> None:
        frames: Any = self.frames
        if isinstance(frames, (str, os.PathLike)):
            raise InputError(f"frames is the path {str(frames)[:200]!r}: read a file by Video.from_file")
        try:
            count = len(frames)
        except TypeError as error:
            kind = type(frames).__name__
            raise InputError(
                f"frames is a {kind}: give a list of images, or an array [frames, height, width, 3]"
            ) from error
        if count < 2:
            raise InputError(f"the video has {count} frames, at least 2 are needed: give a single one as an image")
        timed = not isinstance(self.times, tuple) or len(self.times) > 0
        if timed == (self.fps is not None):
            raise InputError("give either times= (seconds of each frame) or fps= of the frames, and not both")
        object.__setattr__(self, "times", _times(count, self.times, self.fps))
        last, whole = self.times[-1], self.duration
        number = isinstance(whole, (int, float)) and not isinstance(whole, bool)
        if whole is not None and not (number and last <= whole < float("inf")):
            raise InputError(f"duration={whole!r}: give the seconds of the whole video, at least {last:g}")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], sampling: FrameSampling) -> "Video":
        """Frames of a video file, decoded by PyAV (`pip install 'vlcache-jax[video]'`).

        Args:
          path: of the file, whose first video stream counts; nothing is opened by URL.
          sampling: which of the frames; that of a model is `vlm.processor.sampling`.

        Raises:
          InputError: PyAV is not installed, or the file is missing, no video, or has fewer than two frames.
        """
        frames, times, duration = read_frames(path, sampling)
        return cls(frames, times, duration=duration)

    def sampled(self, sampling: FrameSampling) -> "Video":
        """Some of the frames; how many a second has is taken from the first and the last time."""
        fps = (len(self.times) - 1) / (self.times[-1] - self.times[0])
        chosen = sampling.indices(len(self.times), fps)
        return Video([self.frames[i] for i in chosen], [self.times[i] for i in chosen], duration=self.duration)

    def load(self, name: str) -> list[Image.Image]:
        """The frames as RGB images of one size. Raises InputError, naming the frame, if they are not."""
        loaded = [load_image(frame, f"{name}, frame {number}") for number, frame in enumerate(self.frames)]
        for number, frame in enumerate(loaded):
            if frame.size != loaded[0].size:
                raise InputError(
                    f"{name}, frame {number} is {frame.width} x {frame.height} pixels, frame 0 {loaded[0].width} x "
                    f"{loaded[0].height}: give frames of one size"
                )
        return loaded


def _times(count: int, times: Sequence[float], fps: float | None) -> tuple[float, ...]:
    if fps is not None:
        if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
            raise InputError(f"fps={fps!r}: give the positive number of frames that a second has")
        return tuple(number / fps for number in range(count))
    try:
        found = np.asarray(times, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"times={str(times)[:80]!r}: give the seconds of each frame as numbers") from error
    if found.shape != (count,):
        raise InputError(
            f"times has the shape {list(found.shape)}, but the video has {count} frames: give one for each"
        )
    if not np.isfinite(found).all() or found[0] < 0:
        raise InputError(f"times begin with {found[:3].tolist()}: give finite seconds from 0 on")
    late = np.flatnonzero(np.diff(found) <= 0)
    if len(late):
        at = int(late[0]) + 1
        raise InputError(
            f"times[{at}] = {found[at]:g} does not come after times[{at - 1}] = {found[at - 1]:g}: give frames in order"
        )
    return tuple(found.tolist())
