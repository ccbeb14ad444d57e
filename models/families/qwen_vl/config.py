"""What a Qwen-VL is made of."""

import dataclasses

from vlcache_jax.files.exporting import static_field
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.vision.qwen_config import QwenVisionConfig


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVLConfig:
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL (`model_type` qwen2_vl, qwen2_5_vl, qwen3_vl).

    `tokens_per_second` are the steps of the time axis that a second of a video takes (Qwen2.5-VL); None: pairs of
    frames are counted.
    """

    model_type: str
    vision: QwenVisionConfig
    decoder: DecoderConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tokens_per_second: float | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
