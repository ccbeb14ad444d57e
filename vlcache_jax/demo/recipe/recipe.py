"""What the demo's checkpoint is: its size and its curriculum."""

import dataclasses
from typing import NamedTuple

from vlcache_jax.demo.data.samples import FULL_GRID, PATCH
from vlcache_jax.demo.data.tokenizer import BOS, EOS, IMAGE, PAD, build_tokenizer
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.vision.config import VisionConfig


class Shape(NamedTuple):
    """One kind of step, compiled once.

    Attributes:
      tasks: what the rows hold, in turn.
      grid: patches along a side of the images.
      images: images in a prompt.
      rows: rows of the batch.
      length: tokens of a row.
    """

    tasks: tuple[str, ...]
    grid: int
    images: int
    rows: int
    length: int


class Stage(NamedTuple):
    """A part of the curriculum.

    Attributes:
      shapes: kinds of steps, in turn.
      until: go on to the next stage at this running exact match, ...
      latest: ... or at this share of the run.
    """

    shapes: tuple[Shape, ...]
    until: float
    latest: float


_SINGLE = ("documents", "scenes", "documents", "prices", "documents", "counts")
_WHOLE = (*_SINGLE, "places", "places")  # places of an image that is all there, not a window of one
_PAIRS = ("document_pairs",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything the run depends on, apart from its duration."""

    config: LlavaConfig
    stages: tuple[Stage, ...]
    vision_steps: int
    vision_grid: int = 8
    vision_rows: int = 64
    vision_rate: float = 3e-3
    rate: float = 1.2e-3
    warmup: int = 100
    decay: float = 0.25  # the last share of the run, over which the learning rate falls to 0
    seed: int = 0


def _config(vision: dict[str, int], decoder: dict[str, int]) -> LlavaConfig:
    tokenizer = build_tokenizer()
    return LlavaConfig(
        model_type="llava",
        vision=VisionConfig(**vision, image_size=FULL_GRID * PATCH, patch_size=PATCH),
        decoder=DecoderConfig(
            **decoder, family="llama", vocab_size=tokenizer.get_vocab_size(), max_positions=2048, tie_embeddings=True
        ),
        image_token_id=tokenizer.token_to_id(IMAGE),
        feature_layers=(vision["num_layers"],),
        bos_token_id=tokenizer.token_to_id(BOS),
        pad_token_id=tokenizer.token_to_id(PAD),
        eos_token_ids=(tokenizer.token_to_id(EOS),),
    )


FULL = Recipe(
    config=_config(
        {"hidden_size": 128, "intermediate_size": 512, "num_layers": 3, "num_heads": 4},
        {"hidden_size": 192, "intermediate_size": 512, "num_layers": 6, "num_heads": 6, "num_kv_heads": 2,
         "head_dim": 32},
    ),
    # Copying digits from a page with one or two fields comes first; only then is there something to look up.
    stages=(
        Stage((Shape(("documents",), 4, 1, 24, 128),), 0.5, 0.1),
        Stage((Shape(_SINGLE, 6, 1, 20, 160),), 0.65, 0.4),
        Stage((*3 * (Shape(_SINGLE, 10, 1, 15, 288),), Shape(_PAIRS, 6, 2, 16, 256)), 0.75, 0.55),
        Stage((*5 * (Shape(_WHOLE, 16, 1, 12, 512),), Shape(_PAIRS, 10, 2, 12, 384)), 2.0, 1.0),
    ),
    vision_steps=1800,
)  # fmt: skip
"""What the shipped checkpoint was trained with."""
