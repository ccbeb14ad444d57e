"""What a LLaVA is made of."""

import dataclasses

from vlcache_jax.files.exporting import static_field
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.vision.config import VisionConfig


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """LLaVA-1.5 (`llava`), LLaVA-NeXT (`llava_next`) or LLaVA-OneVision (`llava_onevision`).

    `feature_layers` index the tower's hidden states: 0 is the embedding, i the output of layer i; the last one
    equals `vision.num_layers`. Several layers are concatenated along the channels.
    """

    model_type: str
    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    vision_type: str = "clip_vision_model"  # or "siglip_vision_model", which has no class token
    feature_select: str = "default"  # "default" drops the class token, "full" keeps it
    projector_activation: str = "gelu"
    projector_bias: bool = True
    grid_pinpoints: tuple[tuple[int, int], ...] = ()  # (height, width) in pixels; not of LLaVA-1.5
    max_tiles: int | None = None  # LLaVA-OneVision: more tiles than these are shrunk to the area of so many
    video_token_id: int | None = None  # LLaVA-OneVision
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def has_class_token(self) -> bool:
        """Whether a class token is among the features of a tile."""
        return self.vision_type == "clip_vision_model" and self.feature_select == "full"

    @property
    def features_per_tile(self) -> int:
        """Visual features the tower yields for one tile."""
        return self.vision.grid_size**2 + (1 if self.has_class_token else 0)
