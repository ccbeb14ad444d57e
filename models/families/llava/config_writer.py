"""Writing `config.json` for transformers 5."""

from typing import Any

from vlcache_jax.models.decoder.config_writer import text_values, token_values
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.families.llava.defaults import ARCHITECTURES
from vlcache_jax.models.vision.config_writer import vision_values


def config_values(config: LlavaConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model whose weights transformers shall load as `dtype`.

    It describes the vision layers that are run, so that `read_config` returns an equal config.

    Raises:
      CheckpointError: the decoder has biases that its family cannot have.
    """
    single = len(config.feature_layers) == 1
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "dtype": dtype,
        "image_seq_length": config.features_per_tile,
        "image_token_index": config.image_token_id,
        "model_type": config.model_type,
        "multimodal_projector_bias": config.projector_bias,
        "projector_hidden_act": config.projector_activation,
        "text_config": text_values(config.decoder) | token_values(config),
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": vision_values(config.vision, config.vision_type),
        "vision_feature_layer": -1 if single else list(config.feature_layers),
        "vision_feature_select_strategy": config.feature_select,
    }
    if config.vision_type == "siglip_vision_model":
        values["vision_config"]["vision_use_head"] = False
    if config.grid_pinpoints:
        values["image_grid_pinpoints"] = [list(pair) for pair in config.grid_pinpoints]
    if config.max_tiles is not None:
        values |= {"vision_aspect_ratio": f"anyres_max_{config.max_tiles}", "video_token_index": config.video_token_id}
    return values
