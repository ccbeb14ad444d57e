"""What a LLaVA is made of."""

import dataclasses

from vlcache_jax.files.exporting import static_field
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.vision.config import VisionConfig


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """LLaVA-1.5 (`llava`) or LLaVA-NeXT (`llava_next`).

    `feature_layers` index the tower's hidden states: 0 is the embedding, i the output of layer i; the last one
    equals `vision.num_layers`. Several layers are concatenated along the channels.
    """

    model_type: str
    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    feature_select: str = "default"  # "default" drops the class token, "full" keeps it
    projector_activation: str = "gelu"
    projector_bias: bool = True
    grid_pinpoints: tuple[tuple[int, int], ...] = ()  # (height, width) in pixels; LLaVA-NeXT
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def features_per_tile(self) -> int:
        """Visual features the tower yields for one tile."""
        return self.vision.grid_size**2 + (1 if self.feature_select == "full" else 0)
