"""Writing `config.json` for transformers 5."""

from typing import Any

from vlcache_jax.models.decoder.config_writer import text_values, token_values
from vlcache_jax.models.families.qwen_vl.config import QwenVLConfig

_ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


def config_values(config: QwenVLConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model whose weights transformers shall load as `dtype`."""
    vision = config.vision
    tower = {
        "depth": vision.num_layers,
        "hidden_act": vision.activation,
        "in_channels": 3,
        "model_type": f"{config.model_type}_vision",
        "num_heads": vision.num_heads,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.merge_size,
        "temporal_patch_size": vision.frame_pair,
    }
    if config.model_type == "qwen2_vl":
        ratio = vision.intermediate_size // vision.hidden_size
        tower |= {"embed_dim": vision.hidden_size, "hidden_size": vision.output_size, "mlp_ratio": ratio}
    else:
        tower |= {
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "out_hidden_size": vision.output_size,
        }
    if vision.window is not None:
        window = vision.window * vision.patch_size
        tower |= {"fullatt_block_indexes": list(vision.full_layers), "window_size": window}
    if config.tokens_per_second is not None:
        pace = config.tokens_per_second  # of transformers' own type, a whole number
        tower["tokens_per_second"] = int(pace) if pace == int(pace) else pace
    if vision.table_side:
        tower["num_position_embeddings"] = vision.table_side**2
        tower["deepstack_visual_indexes"] = list(vision.deepstack_layers)
    text = text_values(config.decoder) | {"model_type": f"{config.model_type}_text"} | token_values(config)
    return {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "dtype": dtype,
        "image_token_id": config.image_token_id,
        "model_type": config.model_type,
        "text_config": text,
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "video_token_id": config.video_token_id,
        "vision_config": tower,
        "vision_end_token_id": config.vision_end_token_id,
        "vision_start_token_id": config.vision_start_token_id,
    }
