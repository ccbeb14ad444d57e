"""Processors of transformers whose video part needs what the tests do not install."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def without_video(kind: Any) -> Any:
    """What makes a processor of this class without its `video_processor`."""

    class Processor(kind):
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    Processor.__name__ = kind.__name__
    return functools.partial(Processor, video_processor=None)


class Frames:
    """A `video_processor` whose frames are resized by an image processor: transformers' own needs torchvision.

    Args:
      images: a PIL-based image processor that makes one tile of a frame.
      key: what the model calls the pixels.
      times: of the frames, in seconds.
      duration: of the video.
    """

    num_frames = fps = None

    def __init__(self, images: Any, key: str, times: Sequence[float], duration: float | None = None) -> None:
        self.images, self.key = images, key
        self.metadata = SimpleNamespace(fps=1.0, timestamps=list(times), duration=duration)

    def __call__(self, videos: Sequence[np.ndarray], **_: Any) -> dict[str, Any]:
        made = [[self.images(frame, return_tensors="pt")["pixel_values"].squeeze() for frame in v] for v in videos]
        pixels = torch.stack([torch.stack(frames) for frames in made])
        return {self.key: pixels, "video_metadata": [self.metadata] * len(videos)}


def save_without_video(processor: Any, folder: Any, video: dict[str, Any] | None = None) -> None:
    """The files of such a processor as transformers 4 wrote them, each part apart; `video`: settings of videos."""
    if video is not None:
        (Path(folder) / "video_preprocessor_config.json").write_text(json.dumps(video))
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    (Path(folder) / "chat_template.jinja").write_text(processor.chat_template)
