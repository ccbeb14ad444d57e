"""The tiny families of models whose images are square tiles, in one form for the tests that they share."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tiny_internvl
import tiny_siglip_llava
import tiny_smolvlm
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A family's tiny random checkpoint.

    Attributes:
      make: a folder to the model of transformers, which is saved there with its processor.
      processor: the processor of transformers.
      image: what stands for an image in a prompt.
      frames: the image processor that makes tiles of frames, and what the model calls their pixels; None: no videos.
    """

    make: Callable[[Any], Any]
    processor: Callable[[], Any]
    image: str = "<image>"
    frames: tuple[Callable[[], Any], str] | None = None

    @property
    def texts(self) -> list[str]:
        """Prompts with one image, several, none, text before and after."""
        texts = (
            "user: @ w1 w2 w3 assistant:", "w4 @ w5 w6 @ w7 w8 w9 w10", "w1 w2 w3 w4 w5", "w6 @", "@ w1", "w1 @ @ @",
        )  # fmt: skip
        return [text.replace("@", self.image) for text in texts]


TINY = {
    "llava_siglip": Tiny(
        partial(tiny_siglip_llava.make_tiny_siglip_llava, onevision=False),
        partial(tiny_siglip_llava.make_processor, onevision=False),
    ),
    "llava_onevision": Tiny(
        tiny_siglip_llava.make_tiny_siglip_llava,
        tiny_siglip_llava.make_processor,
        frames=(tiny_siglip_llava.frame_processor, "pixel_values_videos"),
    ),
    "internvl": Tiny(
        tiny_internvl.make_tiny_internvl,
        tiny_internvl.make_processor,
        "<IMG_CONTEXT>",
        (tiny_internvl.frame_processor, "pixel_values_videos"),
    ),
    "smolvlm": Tiny(
        tiny_smolvlm.make_tiny_smolvlm,
        tiny_smolvlm.make_processor,
        frames=(tiny_smolvlm.frame_processor, "pixel_values"),
    ),
}


def pictures(seed: int = 0) -> list[list[Image.Image]]:
    """For each of the texts: an even one, two odd ones, none, an extreme one, one of many tiles, three small ones."""
    rng = np.random.default_rng(seed)
    sizes = ((64, 64), (33, 90), (96, 31), (5, 200), (90, 95), (16, 16), (97, 3), (40, 50))
    a, b, c, d, e, f, g, h = (Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes)
    return [[a], [b, c], [], [d], [e], [f, g, h]]
