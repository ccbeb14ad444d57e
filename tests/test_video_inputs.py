"""Videos as an input, whatever the model: what a `Video` takes, and which frames are sampled."""

import dataclasses

import numpy as np
import pytest

import vlcache_jax as vlc
from vlcache_jax.models.families.frame_tiles import read_frame_tiles
from vlcache_jax.models.families.idefics3.videos import InnerSampling, read_videos
from vlcache_jax.models.images.frame_sampling import SegmentSampling

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


@pytest.mark.parametrize(
    ("sampling", "count", "fps", "expected"),
    [
        (InnerSampling(max_frames=5), 45, 10, [0, 14, 29, 44]),
        (InnerSampling(max_frames=5), 250, 25, [25, 75, 125, 175, 225]),
        (InnerSampling(max_frames=5), 90, 30, [0, 44, 89]),
        (InnerSampling(), 10, 10, [0, 9]),  # here transformers takes one
        (InnerSampling(fps=None), 5, 10, [0, 1, 2, 3, 4]),
        (SegmentSampling(num_frames=4, middle=True), 30, 10, [3, 11, 18, 26]),
        (SegmentSampling(num_frames=4, middle=True), 29, 10, [3, 10, 18, 25]),
        (SegmentSampling(num_frames=4), 30, 10, [0, 7, 15, 22]),
        (SegmentSampling(num_frames=4), 29, 10, [0, 7, 14, 21]),
        (SegmentSampling(num_frames=8), 5, 10, [0, 1, 2, 3, 4]),
        (SegmentSampling(num_frames=8, min_frames=2).changed(fps=1), 30, 10, [0, 10, 20]),
    ],
)
def test_sampling_of_families(sampling, count, fps, expected):
    """What SmolVLM2's, InternVL's and LLaVA-OneVision's video processors of transformers 5.23 choose."""
    assert sampling.indices(count, fps).tolist() == expected


SIZE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 32, "width": 34}}, r"frames of videos would have \(32, 34\) pixels, .* takes \(32, 32\)"),
        ({"size": {"shortest_edge": 32}}, r"frames of videos would have \(64, 32\) pixels"),
        ({"size": SIZE, "num_frames": 0}, "v.json: num_frames = .0. are no sampling"),
        ({"size": SIZE, "image_std": [0, 1, 1]}, "v.json: image_std"),
    ],
)
def test_settings_of_videos_that_are_refused(settings, message):
    with pytest.raises(vlc.CheckpointError, match=message):
        read_frame_tiles(settings, "v.json", 32, {}, SegmentSampling(num_frames=8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"video_sampling": 7}, "video_sampling = 7 is not an object"),
        (
            {"video_sampling": {"fps": 1, "max_frames": 2, "video_size": {"height": 7}}},
            "the size of videos is .*height",
        ),
        ({"video_sampling": {"fps": "few"}}, "fps = ..few.. are no sampling"),
    ],
)
def test_settings_of_smolvlm2_that_are_refused(settings, message):
    with pytest.raises(vlc.CheckpointError, match=message):
        read_videos(settings, "v.json", 32, {"size": {"longest_edge": 64}})


def test_settings_of_smolvlm2():
    rules = read_videos({"video_sampling": {"fps": 2, "max_frames": 9}}, "v.json", 32, {"size": {"longest_edge": 64}})
    assert (rules.sampling, rules.longest_edge) == (InnerSampling(fps=2, max_frames=9), 64)
    again = read_videos(rules.values(), "v.json", 32, {"size": {"longest_edge": 1}})
    assert again == rules
