"""Published configurations, for planning without a checkpoint."""

import dataclasses

from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig
from vlcache_jax.models.families.gemma3.config import Gemma3Config
from vlcache_jax.models.vision.config import VisionConfig

# Sources: config.json and generation_config.json of google/gemma-3-{4b,12b,27b}-it on the Hugging Face Hub; what they
# leave out is the default of transformers' Gemma3TextConfig.


def _windows(layers: int) -> tuple[int | None, ...]:
    return tuple(1024 if (i + 1) % 6 else None for i in range(layers))


_DECODER = DecoderConfig(
    family="gemma3_text", vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_layers=34, num_heads=8,
    num_kv_heads=4, head_dim=256, rope=RopeConfig(theta=1e6, kind="linear", factor=8.0, original_max_positions=16384),
    window_rope=RopeConfig(theta=1e4), windows=_windows(34), max_positions=131072, tie_embeddings=True,
    activation="gelu_pytorch_tanh", qk_norm=True, branch_norms=True, one_plus_norms=True, embedding_scale=2560**0.5,
    query_scale=256**-0.5,
)  # fmt: skip
_4B = Gemma3Config(
    # SigLIP So400m/14 at 896 pixels.
    vision=VisionConfig(
        hidden_size=1152, intermediate_size=4304, num_layers=27, num_heads=16, image_size=896, patch_size=14,
        layer_norm_eps=1e-6, activation="gelu_pytorch_tanh",
    ),
    decoder=_DECODER, image_token_id=262144, start_token_id=255999, end_token_id=256000, bos_token_id=2, pad_token_id=0,
    eos_token_ids=(1, 106),
)  # fmt: skip
_12B = dataclasses.replace(
    _DECODER,
    hidden_size=3840, intermediate_size=15360, num_layers=48, num_heads=16, num_kv_heads=8, windows=_windows(48),
    embedding_scale=3840**0.5,
)  # fmt: skip
_27B = dataclasses.replace(
    _DECODER,
    hidden_size=5376, intermediate_size=21504, num_layers=62, num_heads=32, num_kv_heads=16, head_dim=128,
    windows=_windows(62), embedding_scale=5376**0.5, query_scale=168**-0.5,
)  # fmt: skip

PRESETS = {
    "gemma-3-4b-it": _4B,
    "gemma-3-12b-it": dataclasses.replace(_4B, decoder=_12B),
    "gemma-3-27b-it": dataclasses.replace(_4B, decoder=_27B),
}
