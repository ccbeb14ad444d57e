"""Writing `config.json` for transformers 5."""

from typing import Any

from vlcache_jax.models.decoder.config_writer import rope_values, size_values, token_values
from vlcache_jax.models.families.gemma3.config import Gemma3Config
from vlcache_jax.models.vision.config_writer import vision_values


def config_values(config: Gemma3Config, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model whose weights transformers shall load as `dtype`; `read_config` reads it back."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": config.start_token_id,
        "dtype": dtype,
        "eoi_token_index": config.end_token_id,
        "image_token_index": config.image_token_id,
        "mm_tokens_per_image": config.tokens_per_image,
        "model_type": config.model_type,
        "text_config": _text_values(config) | token_values(config),
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": vision_values(config.vision, "siglip_vision_model") | {"vision_use_head": False},
    }


def _text_values(config: Gemma3Config) -> dict[str, Any]:
    decoder = config.decoder
    ropes = {"full_attention": decoder.rope, "sliding_attention": decoder.window_rope or decoder.rope}
    scalar = (decoder.query_scale or decoder.head_dim**-0.5) ** -2
    return size_values(decoder) | {
        "attention_bias": decoder.qkv_bias,
        "hidden_activation": decoder.activation,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in decoder.windows],
        "model_type": decoder.family,
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "rope_parameters": {kind: rope_values(rope) for kind, rope in ropes.items()},
        "sliding_window": next((window for window in decoder.windows if window is not None), None),
    }
