"""Published configurations, for planning without a checkpoint."""

import dataclasses

from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig
from vlcache_jax.models.families.qwen_vl.config import QwenVLConfig
from vlcache_jax.models.vision.qwen_config import QwenVisionConfig

# Source: config.json and generation_config.json of the repositories Qwen/Qwen2.5-VL-<size>-Instruct on the Hugging Face
# Hub, as copies of them in other projects have it.
_DECODER_3B = DecoderConfig(
    family="qwen2", vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_layers=36, num_heads=16,
    num_kv_heads=2, head_dim=128, rope=RopeConfig(theta=1e6, sections=(16, 24, 24)), max_positions=128000,
    qkv_bias=True, tie_embeddings=True,
)  # fmt: skip
_VISION = QwenVisionConfig(
    hidden_size=1280, intermediate_size=3420, num_layers=32, num_heads=16, output_size=2048, patch_size=14,
    activation="silu", rms_norms=True, gated_mlp=True, window=8, full_layers=(7, 15, 23, 31),
)  # fmt: skip
_QWEN_25_3B = QwenVLConfig(
    model_type="qwen2_5_vl", vision=_VISION, tokens_per_second=2.0, decoder=_DECODER_3B, bos_token_id=151643,
    pad_token_id=151643, eos_token_ids=(151645, 151643),
)  # fmt: skip

QWEN2_PRESETS = {
    "qwen2.5-vl-3b": _QWEN_25_3B,
    "qwen2.5-vl-7b": dataclasses.replace(
        _QWEN_25_3B,
        vision=dataclasses.replace(_VISION, output_size=3584),
        decoder=dataclasses.replace(
            _DECODER_3B,
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4,
            tie_embeddings=False,
        ),
    ),
}  # fmt: skip

# Source: config.json of the repositories Qwen/Qwen3-VL-<size>-Instruct on the Hub, as copies of them have it.
_TOWER_4B = QwenVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, output_size=2560, patch_size=16,
    activation="gelu_pytorch_tanh", patch_bias=True, table_side=48, deepstack_layers=(5, 11, 17),
)  # fmt: skip
_DECODER_4B = DecoderConfig(
    family="qwen3", vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32,
    num_kv_heads=8, head_dim=128, rope=RopeConfig(theta=5e6, sections=(24, 20, 20), interleaved=True),
    max_positions=262144, tie_embeddings=True, qk_norm=True,
)  # fmt: skip
_QWEN_3_4B = QwenVLConfig(
    model_type="qwen3_vl", vision=_TOWER_4B, decoder=_DECODER_4B, bos_token_id=151643, pad_token_id=151643,
    eos_token_ids=(151645, 151643),
)  # fmt: skip

QWEN3_PRESETS = {
    "qwen3-vl-2b": dataclasses.replace(
        _QWEN_3_4B,
        vision=dataclasses.replace(_TOWER_4B, output_size=2048),
        decoder=dataclasses.replace(_DECODER_4B, hidden_size=2048, intermediate_size=6144, num_layers=28, num_heads=16),
    ),
    "qwen3-vl-4b": _QWEN_3_4B,
    "qwen3-vl-8b": dataclasses.replace(
        _QWEN_3_4B,
        vision=dataclasses.replace(
            _TOWER_4B,
            hidden_size=1152, intermediate_size=4304, num_layers=27, output_size=4096, deepstack_layers=(8, 16, 24),
        ),
        decoder=dataclasses.replace(_DECODER_4B, hidden_size=4096, intermediate_size=12288, tie_embeddings=False),
    ),
}  # fmt: skip
