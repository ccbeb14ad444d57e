"""Which frames of a video a model sees."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files.json_text import shorten


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

    def changed(self, **numbers: Any) -> "FrameSampling":
        """The same with other numbers; `fps` alone takes the place of a family's own `num_frames`.

        Raises InputError, or TypeError for what is no number.
        """
        exact = {"num_frames": None} if "fps" in numbers else {}
        return dataclasses.replace(self, **exact | numbers)

    def indices(self, count: int, fps: float) -> np.ndarray:
        """i64 [frames], evenly spread from the first of `count` frames to the last; `fps` is the video's own."""
        return np.linspace(0, count - 1, self.wanted(count, fps)).round().astype(np.int64)

    def wanted(self, count: int, fps: float) -> int:
        """How many of `count` frames."""
        if self.num_frames is not None:
            wanted = self.num_frames
        elif self.fps is None:
            wanted = min(count, self.max_frames)
        else:
            wanted = min(max(self._rate(count, fps), self.min_frames), self.max_frames)
        wanted = min(wanted, count)
        return wanted // self.multiple * self.multiple or wanted

    def _rate(self, count: int, fps: float) -> int:
        return int(count / fps * (self.fps or 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentSampling(FrameSampling):
    """One frame of each of equally long parts of a video: the first one, or the one in its middle.

    Attributes:
      middle: which of the two.
    """

    middle: bool = False

    def indices(self, count: int, fps: float) -> np.ndarray:
        """i64 [frames], see `FrameSampling.indices`."""
        wanted = self.wanted(count, fps)
        return (2 * np.arange(wanted, dtype=np.int64) + self.middle) * count // (2 * wanted)


def read_sampling(sampling: FrameSampling, settings: Mapping[str, Any], source: str) -> FrameSampling:
    """A sampling with what settings say of `fps`, `num_frames`, `min_frames` and `max_frames`.

    Raises CheckpointError for numbers that are none.
    """
    names = ("fps", "num_frames", "min_frames", "max_frames")
    numbers: dict[str, Any] = {name: settings[name] for name in names if settings.get(name) is not None}
    try:
        return sampling.changed(**numbers)
    except (InputError, TypeError) as error:
        listed = ", ".join(numbers)
        raise CheckpointError(f"{source}: {listed} = {shorten(list(numbers.values()))} are no sampling") from error
