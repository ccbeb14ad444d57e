"""What transformers leaves out of a `config.json` because it equals its defaults, as data."""

from typing import Any

ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}

VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
# Not the class's defaults but what LLaVA takes if `vision_config` is absent as a whole: CLIP ViT-L/14-336.
VISION_ABSENT: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
# Likewise of LLaVA-OneVision: SigLIP So400m/14-384 without its last layer.
ONEVISION_ABSENT: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ONEVISION_PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))

# What the classes of image processors fill in, where it differs from CLIP's.
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGE_PROCESSORS: dict[str, dict[str, Any]] = {
    "SiglipImageProcessor": {"do_center_crop": False, "size": {"height": 224, "width": 224}} | HALF,
    "LlavaOnevisionImageProcessor": {"do_center_crop": False, "size": {"height": 384, "width": 384}},
}
