"""Videos of models that see every frame as one square tile."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.images.frame_sampling import FrameSampling, read_sampling
from vlcache_jax.models.images.transform import ImageTransform, settings_given


@dataclasses.dataclass(frozen=True)
class FrameTiles:
    """What a checkpoint says of videos.

    Attributes:
      transform: how a frame becomes a tile, and its pixels are normalised.
      sampling: which frames of a file are taken.
    """

    transform: ImageTransform
    sampling: FrameSampling

    def tile(self, frame: Image.Image, name: str) -> np.ndarray:
        """u8 [side, side, 3] of an RGB frame. Raises InputError, naming the video, if it is too elongated."""
        return self.transform.apply(frame, name)

    def values(self) -> dict[str, Any]:
        """What `read_frame_tiles` reads, as transformers 5 writes it."""
        return self.transform.as_dict(crop=False) | {"fps": self.sampling.fps, "num_frames": self.sampling.num_frames}


def read_frame_tiles(
    settings: Mapping[str, Any], source: str, side: int, defaults: Mapping[str, Any], sampling: FrameSampling
) -> FrameTiles:
    """The rules that the settings of a video processor ask for.

    Args:
      settings: of the video processor; or of that of images, where there is none, as transformers takes them.
      source: the name of their file, for messages.
      side: of the vision tower's tiles, in pixels.
      defaults: what the class of transformers fills in, where it differs from CLIP's.
      sampling: the family's own, where the settings say nothing.

    Raises CheckpointError if they are malformed or do not fit the model.
    """
    given = {**defaults, **settings_given(settings)}
    transform = ImageTransform.from_dict({**given, "do_center_crop": False}, source)
    if transform.output_shape(1000, 500) != (side, side):
        raise CheckpointError(
            f"{source}: frames of videos would have {transform.output_shape(1000, 500)} pixels, but the vision tower "
            f"takes {(side, side)}: correct size"
        )
    return FrameTiles(transform, read_sampling(sampling, given, source))
