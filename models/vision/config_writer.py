"""Writing the vision config of a `config.json`."""

from typing import Any

from vlcache_jax.models.vision.config import VisionConfig


def vision_values(vision: VisionConfig, model_type: str) -> dict[str, Any]:
    """What transformers 5 reads as a tower of this type; it describes the layers that are run."""
    return {
        "hidden_act": vision.activation,
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "model_type": model_type,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_layers,
        "patch_size": vision.patch_size,
    }
