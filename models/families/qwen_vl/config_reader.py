"""Reading `config.json` as the Hub has it, and as transformers 4 and 5 write it, for Qwen2-VL and Qwen2.5-VL."""

from typing import Any

from vlcache_jax.files.limits import CHANNELS, HEADS, LAYERS, Range
from vlcache_jax.models.decoder.config_reader import TEXT_DEFAULTS, read_decoder, read_tied, read_token_ids
from vlcache_jax.models.families.qwen_vl.config import QwenVLConfig
from vlcache_jax.models.io.files import CheckpointFolder
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.vision.qwen_config import QwenVisionConfig

# What the configuration classes of transformers fill in for keys a config.json lacks.
_TEXT_DEFAULTS: dict[str, Any] = TEXT_DEFAULTS["qwen2"] | {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_SECTIONS = (16, 24, 24)
_SHAPES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def read_config(root: CheckpointFolder, top: Section) -> QwenVLConfig:
    """What a checkpoint folder's `config.json` (`top`) and `generation_config.json`, if any, describe.

    Raises:
      CheckpointError: if it is malformed, or describes a model that is not supported; the message names the key, the
        value and what is supported.
    """
    model_type, text = top.get("model_type"), _text_section(top)
    tied = read_tied(root, top.flag("tie_word_embeddings", False), text.flag("tie_word_embeddings", False))
    decoder = read_decoder(text, tied, _SECTIONS)
    vision = _read_vision(top.section("vision_config", _VISION_DEFAULTS), model_type)
    if vision.output_size != decoder.hidden_size:
        raise top.error("vision_config", vision.output_size, f"features as wide as the decoder, {decoder.hidden_size}")
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
    return QwenVLConfig(model_type=model_type, vision=vision, decoder=decoder, **ids, **tokens)


def _text_section(top: Section) -> Section:
    """The text config: within `text_config`, or the top level itself, as the Hub's files have it."""
    defaults = _TEXT_DEFAULTS | {"model_type": "qwen2"}
    nested = top.get("text_config") is not None
    text = top.section("text_config", defaults) if nested else Section(top.file, "", top.values, defaults)
    for key in _SHAPES if nested else ():
        if key in top.values and key in text.values and top.values[key] != text.values[key]:
            raise top.error(key, top.values[key], f"the same as text_config.{key}, {text.values[key]}: correct one")
    values = {key: value for key, value in text.values.items() if key != "model_type"}
    return Section(text.file, text.name, values, defaults)


def _read_vision(section: Section, model_type: str) -> QwenVisionConfig:
    for key in ("in_channels", "in_chans"):
        if section.get(key, 3) != 3:
            raise section.error(key, section.get(key), "3 (RGB images)")
    common: dict[str, Any] = {
        "num_layers": section.integer("depth", LAYERS),
        "num_heads": section.integer("num_heads", HEADS),
        "patch_size": section.square("patch_size"),
        "frame_pair": section.integer("temporal_patch_size", Range(1, 16)),
        "merge_size": section.integer("spatial_merge_size", Range(1, 16)),
    }
    width = "embed_dim" if model_type == "qwen2_vl" else "hidden_size"
    hidden = section.integer(width, CHANNELS)
    if hidden % (4 * common["num_heads"]):
        raise section.error(width, hidden, f"a multiple of 4 for each of the {common['num_heads']} heads")
    if model_type == "qwen2_vl":
        return QwenVisionConfig(
            hidden_size=hidden,
            intermediate_size=int(hidden * section.number("mlp_ratio", Range(1, 64))),
            output_size=section.integer("hidden_size", CHANNELS),
            activation=section.activation("hidden_act", "quick_gelu"),
            **common,
        )
    token = common["patch_size"] * common["merge_size"]
    window = section.integer("window_size", Range(token, 2**14))
    full = section.get("fullatt_block_indexes")
    if not isinstance(full, list) or not all(type(x) is int and x >= 0 for x in full):
        raise section.error("fullatt_block_indexes", full, "a list of the numbers of layers")
    return QwenVisionConfig(
        hidden_size=hidden,
        intermediate_size=section.integer("intermediate_size", CHANNELS),
        output_size=section.integer("out_hidden_size", CHANNELS),
        activation=section.activation("hidden_act", "silu"),
        rms_norms=True,
        gated_mlp=True,
        window=window // token * common["merge_size"],
        full_layers=tuple(sorted(x for x in full if x < common["num_layers"])),
        **common,
    )
