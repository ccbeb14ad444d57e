"""Videos as an input, whatever the model: what a `Video` takes, and which frames are sampled."""

import dataclasses

import numpy as np
import pytest

import vlcache_jax as vlc

FRAMES = np.zeros((5, 16, 24, 3), np.uint8)


@pytest.mark.parametrize(
    ("count", "fps", "changes", "expected"),
    [
        (10, 1, {}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),  # 20 wanted, 10 there are
        (30, 30, {}, [0, 10, 19, 29]),  # at least 4
        (90, 30, {}, [0, 18, 36, 53, 71, 89]),
        (100, 30, {"multiple": 2}, [0, 20, 40, 59, 79, 99]),
        (75, 30, {"multiple": 2}, [0, 25, 49, 74]),  # 5 wanted
        (90, 30, {"max_frames": 5}, [0, 22, 44, 67, 89]),
        (90, 30, {"num_frames": 3}, [0, 44, 89]),
        (3, 30, {"num_frames": 8}, [0, 1, 2]),
        (3, 30, {"multiple": 4}, [0, 1, 2]),
        (5, 30, {"fps": None}, [0, 1, 2, 3, 4]),
    ],
)
def test_sampling(count, fps, changes, expected):
    assert dataclasses.replace(vlc.FrameSampling(), **changes).indices(count, fps).tolist() == expected


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        (FRAMES[:0], {"fps": 2}, "the video has 0 frames, at least 2 are needed"),
        (FRAMES[:1], {"fps": 2}, "the video has 1 frames.*give a single one as an image"),
        (FRAMES, {}, "give either times= .* or fps="),
        (FRAMES, {"fps": 2, "times": range(5)}, "give either times= .* or fps="),
        (FRAMES, {"fps": 0}, "fps=0: give the positive number"),
        (FRAMES, {"times": [0, 1]}, r"times has the shape \[2\], but the video has 5 frames"),
        (FRAMES, {"times": [0, 1, 1, 2, 3]}, r"times\[2\] = 1 does not come after times\[1\] = 1"),
        (FRAMES, {"times": [0, 1, np.nan, 2, 3]}, "give finite seconds from 0 on"),
        (FRAMES, {"times": [-1, 1, 2, 3, 4]}, "give finite seconds from 0 on"),
        (FRAMES, {"times": "abcde"}, "times='abcde': give the seconds"),
        (FRAMES, {"fps": 2, "duration": 1.9}, "duration=1.9: give the seconds of the whole video, at least 2"),
        (FRAMES, {"fps": 2, "duration": "long"}, "duration='long': give the seconds"),
        ("a.mp4", {"fps": 2}, "frames is the path 'a.mp4': read a file by Video.from_file"),
        (7, {"fps": 2}, "frames is a int: give a list of images"),
    ],
)
def test_videos_that_cannot_be(frames, options, message):
    with pytest.raises(vlc.InputError, match=message):
        vlc.Video(frames, **options)
