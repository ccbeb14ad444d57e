"""Reading `config.json` as transformers 4 and 5 write it for InternVL."""

import dataclasses

from vlcache_jax.files.limits import LAYERS, Range
from vlcache_jax.models.decoder.config_reader import (
    read_decoder,
    read_image_token,
    read_tied,
    read_token_ids,
    text_section,
)
from vlcache_jax.models.families.internvl.config import InternVLConfig
from vlcache_jax.models.io.files import CheckpointFolder
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.vision.config import VisionConfig
from vlcache_jax.models.vision.config_reader import read_vision

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
    decoder = read_decoder(text, tied)
    top.choice("vision_feature_select_strategy", "default", ["default"])
    ratio = top.number("downsample_ratio", Range(1e-3, 1.0), 0.5)
    shuffle = round(1 / ratio)
    if abs(shuffle * ratio - 1) > 1e-6 or vision.grid_size % shuffle:
        expected = f"1 / n, with a whole n that divides the {vision.grid_size} patches along a side of a tile"
        raise top.error("downsample_ratio", ratio, expected)
    return InternVLConfig(
        vision=vision,
        decoder=decoder,
        image_token_id=read_image_token(top, decoder.vocab_size, 151667),
        shuffle=shuffle,
        projector_activation=top.activation("projector_hidden_act", "gelu"),
        **read_token_ids(root, top, text, decoder.vocab_size),
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
