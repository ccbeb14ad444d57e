"""Frames of video files, by PyAV."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from vlcache_jax.errors import InputError
from vlcache_jax.models.images.frame_sampling import FrameSampling
from vlcache_jax.models.images.opening import check_pixels

MAX_FRAMES = 10_000_000
"""Of a file, before it is decoded."""


def read_frames(path: str | os.PathLike[str], sampling: FrameSampling) -> tuple[list[np.ndarray], list[float], float]:
    """Frames u8 [height, width, 3] of the first video stream, their times in seconds from its first frame on, and how
    long the whole stream is.

    The file is read twice: once for the times of its frames, which no header is trusted with, and once to decode.

    Raises InputError, see `Video.from_file`.
    """
    av, name = check_video_file(path)
    try:
        times = _times(av, path, name)
        if len(times) < 2:
            raise InputError(f"{name} has {len(times)} frames, at least 2 are needed: give a single one as an image")
        chosen = sampling.indices(len(times), (len(times) - 1) / (times[-1] - times[0]))
        frames = _decode(av, path, name, set(chosen.tolist()))
    except (av.FFmpegError, ValueError, OSError) as error:
        raise InputError(f"{name} cannot be read ({error}): convert it, or fetch it again") from error
    if len(frames) < 2:
        raise InputError(f"{name} breaks off: {len(frames)} of {len(chosen)} frames could be decoded: fetch it again")
    duration = times[-1] * len(times) / (len(times) - 1)
    return [frame for _, frame in frames], [times[number] for number, _ in frames], duration


def check_video_file(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """PyAV, and what errors call the video. Raises InputError: PyAV is not installed, or there is no such file."""
    av = _pyav()
    name = f"the video {os.fspath(path)[:200]!r}"
    try:
        is_file = Path(path).is_file()
    except (OSError, ValueError) as error:  # a name too long, a NUL inside
        raise InputError(f"{name} is not a usable path ({error})") from error
    if not is_file:
        raise InputError(f"{name} is not a file: check the path")
    return av, name


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError("reading a video file needs PyAV: pip install 'vlcache-jax[video]', or give frames") from error
    return av


def _open(av: Any, path: str | os.PathLike[str], name: str) -> Any:
    # The protocols of ffmpeg could open other files and addresses that a playlist names.
    container = av.open(os.path.abspath(path), options={"protocol_whitelist": "file"})
    if not container.streams.video:
        container.close()
        raise InputError(f"{name} has no video stream: give another file")
    return container


def _times(av: Any, path: str | os.PathLike[str], name: str) -> list[float]:
    with _open(av, path, name) as container:
        stream = container.streams.video[0]
        check_pixels(stream.height, stream.width, name)
        stamps: list[int] = []
        for packet in container.demux(stream):
            if packet.pts is not None and packet.size:
                stamps.append(packet.pts)
            if len(stamps) > MAX_FRAMES:
                raise InputError(f"{name} has more than {MAX_FRAMES} frames: cut it first")
        rising = sorted(set(stamps))
        return [float((stamp - rising[0]) * stream.time_base) for stamp in rising]


def _decode(av: Any, path: str | os.PathLike[str], name: str, wanted: set[int]) -> list[tuple[int, np.ndarray]]:
    found: list[tuple[int, np.ndarray]] = []
    with _open(av, path, name) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                found.append((number, frame.to_ndarray(format="rgb24")))
            if number >= max(wanted):
                break
    return found
