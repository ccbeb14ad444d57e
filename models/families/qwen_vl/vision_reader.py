"""Reading the `vision_config` of a Qwen-VL."""

from typing import Any

from vlcache_jax.files.limits import CHANNELS, HEADS, LAYERS, Range
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.vision.qwen_config import QwenVisionConfig

# What the configuration classes of transformers fill in for keys a config.json lacks.
_QWEN2: dict[str, Any] = {
    "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "intermediate_size": 3420, "mlp_ratio": 4, "num_heads": 16,
    "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
    "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "in_channels": 3, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip


def read_tower(top: Section, model_type: str) -> QwenVisionConfig:
    """The vision tower of a `config.json`. Raises CheckpointError for what is malformed or not supported."""
    section = top.section("vision_config", _QWEN3 if model_type == "qwen3_vl" else _QWEN2)
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
    common["intermediate_size"] = section.integer("intermediate_size", CHANNELS)
    common["output_size"] = section.integer("out_hidden_size", CHANNELS)
    if model_type == "qwen3_vl":
        return _qwen3(section, hidden, common)
    token = common["patch_size"] * common["merge_size"]
    window = section.integer("window_size", Range(token, 2**14))
    full = _layer_numbers(section, "fullatt_block_indexes")
    return QwenVisionConfig(
        hidden_size=hidden,
        activation=section.activation("hidden_act", "silu"),
        rms_norms=True,
        gated_mlp=True,
        window=window // token * common["merge_size"],
        full_layers=tuple(sorted(x for x in full if x < common["num_layers"])),
        **common,
    )


def _qwen3(section: Section, hidden: int, common: dict[str, Any]) -> QwenVisionConfig:
    table = section.integer("num_position_embeddings", Range(1, 2**24))
    side = round(table**0.5)
    if side**2 != table:
        raise section.error("num_position_embeddings", table, "a square number: a table with as many rows as columns")
    layers = _layer_numbers(section, "deepstack_visual_indexes")
    if layers != sorted(set(layers)) or any(x >= common["num_layers"] for x in layers):
        expected = f"rising numbers below {common['num_layers']}, the number of layers (depth)"
        raise section.error("deepstack_visual_indexes", layers, expected)
    rope = section.section("rope_parameters")
    if rope.get("rope_type") not in (None, "axial", "default") or rope.get("rope_theta") not in (None, 1e4):
        raise section.error("rope_parameters", rope.values, "rope_type axial and rope_theta 10000")
    return QwenVisionConfig(
        hidden_size=hidden,
        activation=section.activation("hidden_act", "gelu_pytorch_tanh"),
        patch_bias=True,
        table_side=side,
        deepstack_layers=tuple(layers),
        **common,
    )


def _layer_numbers(section: Section, key: str) -> list[int]:
    found = section.get(key)
    if not isinstance(found, (list, tuple)) or not all(type(x) is int and x >= 0 for x in found):
        raise section.error(key, found, "a list of the numbers of layers")
    return list(found)
