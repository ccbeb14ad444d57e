"""Published configurations, for planning without a checkpoint."""

import dataclasses

from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig
from vlcache_jax.models.families.internvl.config import InternVLConfig
from vlcache_jax.models.vision.config import VisionConfig

# Sources: config.json of OpenGVLab/InternVL3-{1B,2B,8B}-hf on the Hugging Face Hub, and of Qwen2.5-{0.5B,1.5B,7B}.
# InternVL3.5: those of Qwen3-{0.6B,1.7B,4B,8B,14B}, and the numbers of parameters in its authors' documentation, by
# which no size ties its embeddings; the visual token's id is from memory, and nothing in a plan depends on it.
_2B = DecoderConfig(
    family="qwen2", vocab_size=151674, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
    num_kv_heads=2, head_dim=128, rope=RopeConfig(theta=1e6, kind="dynamic", factor=2.0), max_positions=32768,
    qkv_bias=True,
)  # fmt: skip
_CONFIG = InternVLConfig(
    vision=VisionConfig(
        hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, image_size=448, patch_size=14,
        layer_norm_eps=1e-6, activation="gelu", qkv_bias=True, layer_scale=True,
    ),
    decoder=_2B, image_token_id=151667, bos_token_id=151643, pad_token_id=151643, eos_token_ids=(151645,),
)  # fmt: skip
_1B = dataclasses.replace(
    _2B, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64
)
_8B = dataclasses.replace(_2B, hidden_size=3584, intermediate_size=18944, num_heads=28, num_kv_heads=4)

_NEWER_8B = DecoderConfig(
    family="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32,
    num_kv_heads=8, head_dim=128, rope=RopeConfig(theta=1e6), max_positions=40960, qk_norm=True,
)  # fmt: skip


def _newer(hidden: int, intermediate: int, layers: int, heads: int) -> InternVLConfig:
    decoder = dataclasses.replace(
        _NEWER_8B, hidden_size=hidden, intermediate_size=intermediate, num_layers=layers, num_heads=heads
    )
    return dataclasses.replace(_CONFIG, decoder=decoder, image_token_id=151671)


PRESETS = {
    "internvl3-1b": dataclasses.replace(_CONFIG, decoder=_1B),
    "internvl3-2b": _CONFIG,
    "internvl3-8b": dataclasses.replace(_CONFIG, decoder=_8B),
    "internvl3.5-1b": _newer(1024, 3072, 28, 16),
    "internvl3.5-2b": _newer(2048, 6144, 28, 16),
    "internvl3.5-4b": _newer(2560, 9728, 36, 32),
    "internvl3.5-8b": _newer(4096, 12288, 36, 32),
    "internvl3.5-14b": _newer(5120, 17408, 40, 40),
}
