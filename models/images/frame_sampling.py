"""Which frames of a video a model sees."""

import dataclasses

import numpy as np

from vlcache_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a video a model sees. A family says its own; `dataclasses.replace` changes it.

    Attributes:
      fps: frames for each second of the video; None for all of them.
      min_frames, max_frames: at least and at most so many, however long the video is; never more than it has.
      num_frames: exactly so many (or as many as the video has), instead of `fps` and the limits.
      multiple: the number of frames is rounded down to a multiple of it.

    Raises InputError for numbers that are out of range or in the wrong order.
    """

    fps: float | None = 2.0
    min_frames: int = 4
    max_frames: int = 768
    num_frames: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        numbers = (self.min_frames, self.max_frames, self.multiple, 2 if self.num_frames is None else self.num_frames)
        whole = all(type(x) is int and x >= 1 for x in numbers) and self.min_frames <= self.max_frames
        if not whole or (self.fps is not None and not 0 < self.fps < float("inf")):
            raise InputError(f"{self} is no sampling: give a positive fps, and whole numbers of frames in order")

    def indices(self, count: int, fps: float) -> np.ndarray:
        """i64 [frames], evenly spread from the first of `count` frames to the last; `fps` is the video's own."""
        if self.num_frames is not None:
            wanted = self.num_frames
        elif self.fps is None:
            wanted = min(count, self.max_frames)
        else:
            wanted = min(max(int(count / fps * self.fps), self.min_frames), self.max_frames)
        wanted = min(wanted, count)
        wanted = wanted // self.multiple * self.multiple or wanted
        return np.linspace(0, count - 1, wanted).round().astype(np.int64)
