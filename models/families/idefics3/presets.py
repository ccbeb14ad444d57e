"""Published configurations, for planning without a checkpoint."""

import dataclasses

from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig
from vlcache_jax.models.families.idefics3.config import Idefics3Config
from vlcache_jax.models.vision.config import VisionConfig

# Sources: config.json and generation_config.json of HuggingFaceTB/SmolVLM2-{256M,500M}-Video-Instruct and
# -2.2B-Instruct on the Hugging Face Hub.
_SMALL = VisionConfig(
    hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12, image_size=512, patch_size=16,
    layer_norm_eps=1e-6, activation="gelu_pytorch_tanh",
)  # fmt: skip
_500M = DecoderConfig(
    family="llama", vocab_size=49280, hidden_size=960, intermediate_size=2560, num_layers=32, num_heads=15,
    num_kv_heads=5, head_dim=64, rms_norm_eps=1e-5, rope=RopeConfig(theta=1e5), max_positions=8192,
)  # fmt: skip
_CONFIG = Idefics3Config(
    model_type="smolvlm", vision=_SMALL, decoder=_500M, image_token_id=49190, shuffle=4, bos_token_id=1, pad_token_id=2,
    eos_token_ids=(49279,),
)  # fmt: skip
_256M = dataclasses.replace(_500M, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3)
_LARGE = dataclasses.replace(
    _SMALL, hidden_size=1152, intermediate_size=4304, num_layers=27, num_heads=16, image_size=384, patch_size=14
)
_2B = dataclasses.replace(
    _500M,
    hidden_size=2048, intermediate_size=8192, num_layers=24, num_heads=32, num_kv_heads=32,
    rope=RopeConfig(theta=130000.0),
)  # fmt: skip

PRESETS = {
    "smolvlm2-256m": dataclasses.replace(_CONFIG, decoder=_256M),
    "smolvlm2-500m": _CONFIG,
    "smolvlm2-2.2b": dataclasses.replace(_CONFIG, vision=_LARGE, decoder=_2B, shuffle=3),
}
