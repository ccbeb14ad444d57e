"""What an Idefics3 is made of."""

import dataclasses

from vlcache_jax.files.exporting import static_field
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.vision.config import VisionConfig


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class Idefics3Config:
    """Idefics3 and SmolVLM (`idefics3`), SmolVLM2 (`smolvlm`).

    `shuffle` divides the patches along a side of a tile; so many squared become one token.
    """

    model_type: str
    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int
    shuffle: int = 2
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def token_grid(self) -> int:
        """Visual tokens along one side of a tile."""
        return self.vision.grid_size // self.shuffle
