"""What a Gemma 3 is made of."""

import dataclasses
import math

from vlcache_jax.files.exporting import static_field
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.vision.config import VisionConfig


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config:
    """Gemma 3 (`gemma3`). `tokens_per_image` is a square number whose root divides the tower's patches along a side."""

    model_type: str = "gemma3"
    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int
    start_token_id: int  # before an image; it also stands for one in a prompt
    end_token_id: int
    tokens_per_image: int = 256
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def token_grid(self) -> int:
        """Visual tokens along one side of an image."""
        return math.isqrt(self.tokens_per_image)

    @property
    def features_per_tile(self) -> int:
        """Visual features of one image."""
        return self.tokens_per_image
