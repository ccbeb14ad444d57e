"""Published configurations, for planning without a checkpoint."""

import dataclasses

from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig
from vlcache_jax.models.families.llava.config import NEXT_PINPOINTS, ONEVISION_PINPOINTS, LlavaConfig
from vlcache_jax.models.vision.config import VisionConfig

# Sources: config.json and generation_config.json of the repositories llava-hf/<name>-hf on the Hugging Face Hub, and of
# the language models they name (vicuna-7b-v1.5, Mistral-7B-Instruct-v0.2, Nous-Hermes-2-Yi-34B, Qwen2-0.5B and -7B).
_VICUNA = DecoderConfig(
    family="llama", vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32,
    num_kv_heads=32, head_dim=128, rms_norm_eps=1e-5, max_positions=4096,
)  # fmt: skip
_LLAVA_15 = LlavaConfig(
    model_type="llava",
    # CLIP ViT-L/14 at 336 pixels. It has 24 layers; LLaVA takes its features from the 23rd, so the last one is not run.
    vision=VisionConfig(
        hidden_size=1024, intermediate_size=4096, num_layers=23, num_heads=16, image_size=336, patch_size=14
    ),
    decoder=_VICUNA, image_token_id=32000, feature_layers=(23,), bos_token_id=1, pad_token_id=32001, eos_token_ids=(2,),
)  # fmt: skip
_NEXT = dataclasses.replace(_LLAVA_15, model_type="llava_next", grid_pinpoints=NEXT_PINPOINTS)
_MISTRAL = dataclasses.replace(
    _VICUNA,
    family="mistral", intermediate_size=14336, num_kv_heads=8, rope=RopeConfig(theta=1e6), max_positions=32768,
)  # fmt: skip
_YI = dataclasses.replace(
    _VICUNA,
    vocab_size=64064, hidden_size=7168, intermediate_size=20480, num_layers=60, num_heads=56, num_kv_heads=8,
    rope=RopeConfig(theta=5e6),
)  # fmt: skip
_QWEN2 = DecoderConfig(
    family="qwen2", vocab_size=152128, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28,
    num_kv_heads=4, head_dim=128, rope=RopeConfig(theta=1e6), max_positions=32768, qkv_bias=True,
)  # fmt: skip
_ONEVISION = LlavaConfig(
    model_type="llava_onevision",
    vision=VisionConfig(
        hidden_size=1152, intermediate_size=4304, num_layers=26, num_heads=16, image_size=384, patch_size=14,
        layer_norm_eps=1e-6, activation="gelu_pytorch_tanh",
    ),
    decoder=_QWEN2, image_token_id=151646, feature_layers=(26,), vision_type="siglip_vision_model",
    feature_select="full", grid_pinpoints=ONEVISION_PINPOINTS, max_tiles=9, video_token_id=151647, bos_token_id=151643,
    eos_token_ids=(151645,),
)  # fmt: skip
_QWEN2_HALF = dataclasses.replace(
    _QWEN2,
    vocab_size=152000, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, num_kv_heads=2,
    head_dim=64, tie_embeddings=True,
)  # fmt: skip

PRESETS = {
    "llava-1.5-7b": _LLAVA_15,
    "llava-v1.6-mistral-7b": dataclasses.replace(_NEXT, decoder=_MISTRAL),
    "llava-v1.6-34b": dataclasses.replace(
        _NEXT, decoder=_YI, image_token_id=64000, pad_token_id=64001, eos_token_ids=(7,)
    ),
    "llava-onevision-qwen2-0.5b-ov": dataclasses.replace(_ONEVISION, decoder=_QWEN2_HALF),
    "llava-onevision-qwen2-7b-ov": _ONEVISION,
}
