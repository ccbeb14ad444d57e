"""Writing `config.json` for transformers 5."""

from typing import Any

from vlcache_jax.models.decoder.config_writer import text_values, token_values
from vlcache_jax.models.families.idefics3.config import Idefics3Config
from vlcache_jax.models.vision.config_writer import vision_values

NAMES = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}
"""What the names of transformers' classes begin with."""


def config_values(config: Idefics3Config, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model whose weights transformers shall load as `dtype`; `read_config` reads it back."""
    return {
        "architectures": [f"{NAMES[config.model_type]}ForConditionalGeneration"],
        "dtype": dtype,
        "image_token_id": config.image_token_id,
        "model_type": config.model_type,
        "scale_factor": config.shuffle,
        "text_config": text_values(config.decoder) | token_values(config),
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": vision_values(config.vision, f"{config.model_type}_vision"),
    }
