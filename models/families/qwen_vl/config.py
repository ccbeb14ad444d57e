"""What a Qwen-VL is made of, and its `config.json` as the Hub has it, and as transformers 4 and 5 write it."""

import dataclasses
from typing import Any

from vlcache_jax.files.exporting import static_field
from vlcache_jax.files.limits import Range
from vlcache_jax.models.decoder.config_reader import TEXT_DEFAULTS, read_decoder, read_tied, read_token_ids
from vlcache_jax.models.decoder.config_writer import text_values, token_values
from vlcache_jax.models.families.family import ModelConfig
from vlcache_jax.models.families.qwen_vl.vision_reader import read_tower
from vlcache_jax.models.io.files import CheckpointFolder
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.vision.qwen_config import QwenVisionConfig


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVLConfig(ModelConfig):
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL (`model_type` qwen2_vl, qwen2_5_vl, qwen3_vl).

    `tokens_per_second` are the steps of the time axis that a second of a video takes (Qwen2.5-VL); None: pairs of
    frames are counted.
    """

    vision: QwenVisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tokens_per_second: float | None = None


# What the configuration classes of transformers fill in for keys a config.json lacks.
_QWEN2: dict[str, Any] = TEXT_DEFAULTS["qwen2"] | {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_window_layers": 80,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
    "max_position_embeddings": 128000, "rope_theta": 5e5, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_TEXT_DEFAULTS = {"qwen2_vl": _QWEN2, "qwen2_5_vl": _QWEN2, "qwen3_vl": _QWEN3}
_SECTIONS = {"qwen2_vl": (16, 24, 24), "qwen2_5_vl": (16, 24, 24), "qwen3_vl": (24, 20, 20)}
_SHAPES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def read_config(root: CheckpointFolder, top: Section) -> QwenVLConfig:
    """See `Family.read_config`."""
    model_type = str(top.get("model_type"))
    text = _text_section(top, _TEXT_DEFAULTS[model_type])
    tied = read_tied(root, top.flag("tie_word_embeddings", False), text.flag("tie_word_embeddings", False))
    decoder = read_decoder(text, tied, _SECTIONS[model_type], interleaved=model_type == "qwen3_vl")
    vision = read_tower(top, model_type)
    if vision.output_size != decoder.hidden_size:
        raise top.error("vision_config", vision.output_size, f"features as wide as the decoder, {decoder.hidden_size}")
    if len(vision.deepstack_layers) > decoder.num_layers:
        layers = list(vision.deepstack_layers)
        raise top.error(
            "vision_config.deepstack_visual_indexes", layers, f"at most {decoder.num_layers} decoder layers"
        )
    ids = {}
    for name in _TOKENS:
        default = QwenVLConfig.__dataclass_fields__[name].default
        ids[name] = top.get(name, default)
        if type(ids[name]) is not int or ids[name] < 0:
            raise top.error(name, ids[name], "a token id")
    image = ids["image_token_id"]
    if image >= decoder.vocab_size:
        raise top.error("image_token_id", image, f"a token id below the vocab_size {decoder.vocab_size}")
    tokens = read_token_ids(root, top, text, decoder.vocab_size)
    pace = None
    if model_type == "qwen2_5_vl":
        pace = top.section("vision_config").number("tokens_per_second", Range(1e-3, 1e6), 4)
    return QwenVLConfig(model_type=model_type, vision=vision, decoder=decoder, tokens_per_second=pace, **ids, **tokens)


def _text_section(top: Section, defaults: dict[str, Any]) -> Section:
    """The text config: within `text_config`, or the top level itself, as the Hub's files of Qwen2.5-VL have it."""
    nested = top.get("text_config") is not None
    text = top.section("text_config", defaults) if nested else Section(top.file, "", top.values, defaults)
    for key in _SHAPES if nested else ():
        if key in top.values and key in text.values and top.values[key] != text.values[key]:
            raise top.error(key, top.values[key], f"the same as text_config.{key}, {text.values[key]}: correct one")
    values = {key: value for key, value in text.values.items() if key != "model_type"}
    return Section(text.file, text.name, values, defaults)


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
