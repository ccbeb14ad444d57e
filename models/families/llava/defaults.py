"""What transformers leaves out of a `config.json` because it equals its defaults, as data."""

from typing import Any

ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
}

VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# Not the class's defaults but what LLaVA takes if `vision_config` is absent as a whole: CLIP ViT-L/14-336.
VISION_ABSENT: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
