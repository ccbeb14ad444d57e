"""Writing `config.json` for transformers 5."""

from typing import Any

from vlcache_jax.models.decoder.config_writer import text_values, token_values
from vlcache_jax.models.families.internvl.config import InternVLConfig
from vlcache_jax.models.vision.config_writer import vision_values


def config_values(config: InternVLConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model whose weights transformers shall load as `dtype`; `read_config` reads it back."""
    vision = vision_values(config.vision, "internvl_vision")
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 1 / config.shuffle,
        "dtype": dtype,
        "image_seq_length": config.token_grid**2,
        "image_token_id": config.image_token_id,
        "model_type": config.model_type,
        "projector_hidden_act": config.projector_activation,
        "text_config": text_values(config.decoder) | token_values(config),
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": vision
        | {
            "attention_bias": config.vision.qkv_bias,
            "image_size": [config.vision.image_size] * 2,
            "norm_type": "layer_norm",
            "patch_size": [config.vision.patch_size] * 2,
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": True,
            "use_qk_norm": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
