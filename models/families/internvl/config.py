"""What an InternVL is made of, and its `config.json` as transformers 4 and 5 write it."""

import dataclasses
from typing import Any

from vlcache_jax.files.exporting import static_field
from vlcache_jax.files.limits import LAYERS, Range
from vlcache_jax.models.decoder.config_reader import read_text, read_tied, text_section
from vlcache_jax.models.decoder.config_writer import text_values, token_values
from vlcache_jax.models.families.family import ModelConfig
from vlcache_jax.models.io.files import CheckpointFolder
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.vision.config import VisionConfig, read_vision, vision_values


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class InternVLConfig(ModelConfig):
    """InternVL (`internvl`). `shuffle` divides the patches along a side of a tile; so many squared become one token."""

    model_type: str = "internvl"
    vision: VisionConfig
    shuffle: int = 2
    projector_activation: str = "gelu"

    @property
    def token_grid(self) -> int:
        """Visual tokens along one side of a tile."""
        return self.vision.grid_size // self.shuffle


# What the configuration class of transformers fills in.
_VISION_DEFAULTS = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_channels": 3, "image_size": 448, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip
_LARGE = ": the tower of 6B parameters (38B and 78B) is not supported; take a smaller model"


def read_config(root: CheckpointFolder, top: Section) -> InternVLConfig:
    """See `Family.read_config`."""
    text, vision = text_section(top, "qwen2"), _vision(top)
    tied = read_tied(root, top.flag("tie_word_embeddings", True), text.flag("tie_word_embeddings", False))
    top.choice("vision_feature_select_strategy", "default", ["default"])
    ratio = top.number("downsample_ratio", Range(1e-3, 1.0), 0.5)
    shuffle = round(1 / ratio)
    if abs(shuffle * ratio - 1) > 1e-6 or vision.grid_size % shuffle:
        expected = f"1 / n, with a whole n that divides the {vision.grid_size} patches along a side of a tile"
        raise top.error("downsample_ratio", ratio, expected)
    return InternVLConfig(
        vision=vision,
        shuffle=shuffle,
        projector_activation=top.activation("projector_hidden_act", "gelu"),
        **read_text(root, top, text, tied, image_token=151667),
    )


def _vision(top: Section) -> VisionConfig:
    section = top.section("vision_config", _VISION_DEFAULTS)
    section.choice("model_type", "internvl_vision", ["internvl_vision"])
    section.choice("norm_type", "layer_norm", ["layer_norm"], _LARGE)
    if section.flag("use_qk_norm", False):
        raise section.error("use_qk_norm", True, f"false{_LARGE}")
    for key in ("use_mean_pooling", "use_absolute_position_embeddings"):
        if not section.flag(key, True):
            raise section.error(key, False, "true")
    layers = section.integer("num_hidden_layers", LAYERS)
    value = top.get("vision_feature_layer", -1)
    if type(value) is not int or not -layers - 1 <= value <= layers:
        expected = f"one of {-layers - 1}..{layers}, the hidden states of {layers} vision layers"
        raise top.error("vision_feature_layer", value, expected)
    vision = read_vision(section, value if value >= 0 else layers + 1 + value, remainder=True)
    return dataclasses.replace(vision, qkv_bias=section.flag("attention_bias", False), layer_scale=True)


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
