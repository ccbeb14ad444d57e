"""How videos become patches and text: their size, their times, and what is written around their frames."""

import dataclasses
from collections.abc import Mapping, Sequence

from vlcache_jax.models.images.frame_sampling import FrameSampling
from vlcache_jax.models.images.smart_resize import smart_resize
from vlcache_jax.models.images.transform import ImageTransform

_FRAME_TOKENS = 768  # of a frame at most, where pixels are capped: the authors' rule (qwen-vl-utils)
_VIDEO_TOKENS = int(0.9 * 128_000)  # of a whole video of Qwen2-VL and Qwen2.5-VL, likewise


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoRules:
    """What a checkpoint says of videos.

    Attributes:
      transform: the filter of resizing, and how pixels are normalised.
      min_pixels, max_pixels: least and greatest area of a resized frame; of all frames together if `of_all` (Qwen3-VL).
      of_all: what the limits are of.
      cap_pixels_per_frame: whether the authors' own rule bounds the pixels of a frame further: 768 tokens (Qwen3-VL),
        or its share of 115,200 for the video (Qwen2-VL, Qwen2.5-VL). transformers has it switched off unless it is
        told otherwise.
      sampling: which frames of a file are taken.
      timestamps: whether the time is written in front of every pair of frames, which are images to the decoder
        (Qwen3-VL); else the decoder's positions tell it.
      wrapper: what becomes of the tokens around the video's token in a prompt, of a model that writes its own around
        each pair of frames: "v4" takes them away, as transformers 4 and vllm do, "v5" leaves them, as transformers 5.
    """

    transform: ImageTransform
    min_pixels: int
    max_pixels: int
    of_all: bool
    cap_pixels_per_frame: bool = False
    sampling: FrameSampling
    timestamps: bool
    wrapper: str = "v4"

    def frame_shape(self, frames: int, height: int, width: int, pair: int, factor: int, name: str) -> tuple[int, int]:
        """(height, width) of every resized frame.

        Args:
          frames: how many there are.
          height, width: of each, in pixels.
          pair: frames that become one patch.
          factor: side of what becomes one visual token, in pixels.
          name: of the video, for the error.

        Raises InputError for frames that are too long.
        """
        most, floor = self.max_pixels, int(self.min_pixels * 1.05)
        if self.of_all:
            if self.cap_pixels_per_frame:
                most = frames * max(min(_FRAME_TOKENS * factor**2, most // frames), floor)
            if min(height, width) < factor:
                scale = max(factor / height, factor / width)
                height, width = int(height * scale), int(width * scale)
        elif self.cap_pixels_per_frame:
            most = max(min(most, _VIDEO_TOKENS * factor**2 * pair // frames), floor)
        limits = {"min_pixels": self.min_pixels, "max_pixels": most}
        several = {"frames": frames, "pair": pair} if self.of_all else {}
        return smart_resize(height, width, factor=factor, name=name, **limits, **several)

    def text(self, times: Sequence[float], pair: int, tokens: int, names: Mapping[str, str]) -> str:
        """What stands in a prompt for a video: `tokens` visual tokens for each pair of frames, and what is around them.

        Args:
          times: of each frame, in seconds.
          pair: frames that become one patch.
          tokens: visual tokens of a pair.
          names: the special tokens by name.
        """
        times = [*times, *[times[-1]] * (-len(times) % pair)]
        firsts, visual = range(0, len(times), pair), names["video_token"] * tokens
        if not self.timestamps:
            return visual * len(firsts)
        framed = names["vision_start_token"] + visual + names["vision_end_token"]
        return "".join(f"<{(times[i] + times[i + pair - 1]) / 2:.1f} seconds>{framed}" for i in firsts)
