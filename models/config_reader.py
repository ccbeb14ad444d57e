"""Reading `config.json` as transformers 4 and 5 write it for LLaVA, and writing it for transformers 5.

transformers leaves out of the file what equals its defaults, so the defaults are repeated here, as data.
"""

import difflib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlcache_jax.errors import CheckpointError, VLCacheError
from vlcache_jax.models.activations import activation
from vlcache_jax.models.checkpoint.files import checkpoint_folder, file_inside, read_json
from vlcache_jax.models.checkpoint.safetensors_reader import SafetensorsFolder
from vlcache_jax.models.config import DecoderConfig, LlavaConfig, RopeConfig, VisionConfig

ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
}
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")

# What the configuration classes of transformers fill in for keys a config.json lacks.
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}
_VISION_DEFAULTS: dict[str, Any] = {
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
_VISION_ABSENT: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


class _Section:
    """One JSON object of a config file, with its defaults and its name for messages."""

    def __init__(self, file: Path, name: str, values: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.file, self.name, self.values, self.defaults = file, name, values, defaults

    def get(self, key: str, default: Any = None) -> Any:
        """The value; JSON null stays None (it means something for some keys)."""
        return self.values.get(key, self.defaults.get(key, default))

    def error(self, key: str, value: Any, expected: str) -> CheckpointError:
        full = f"{self.name}.{key}" if self.name else key
        return CheckpointError(f"{self.file}: {full} is {_short(value)}; expected {expected}")

    def section(self, key: str, defaults: dict[str, Any] | None = None) -> "_Section":
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, value, "an object")
        return _Section(self.file, f"{self.name}.{key}".lstrip("."), value or {}, defaults or {})

    def integer(self, key: str, minimum: int = 1) -> int:
        value = self.get(key)
        if type(value) is not int or value < minimum:
            raise self.error(key, value, f"a whole number of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None, minimum: float = 0.0) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= minimum:
            raise self.error(key, value, f"a number above {minimum:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.error(key, value, "true or false")
        return value

    def choice(self, key: str, default: str, supported: Iterable[str]) -> str:
        value = self.get(key, default)
        if value not in list(supported):
            near = difflib.get_close_matches(str(value), supported, n=len(list(supported)), cutoff=0.0)
            raise self.error(key, value, f"one of the supported {', '.join(near)}")
        return value

    def activation(self, key: str, default: str) -> str:
        value = self.get(key, default)
        try:
            activation(value)
        except VLCacheError as error:
            raise self.error(key, value, f"an activation function; {error}") from None
        return value

    def square(self, key: str) -> int:
        """A side length, which may be given as two equal ones."""
        value = self.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int or value < 1:
            raise self.error(key, self.get(key), "a positive whole number (or two equal ones)")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or several; none if absent, null or negative (some files mean "no such token" by -1)."""
        value = self.get(key)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if not all(type(v) is int for v in values):
            raise self.error(key, value, "a token id or a list of them")
        return tuple(v for v in values if v >= 0)


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list | str) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def read_config(folder: str | Path) -> LlavaConfig:
    """What a checkpoint folder's `config.json` (and `generation_config.json`, if any) describes.

    Raises:
      CheckpointError: if a file is missing or malformed, or describes a model that is not supported; the
        message names the key, the value and what is supported.
    """
    root = checkpoint_folder(folder)
    path = file_inside(root, "config.json")
    top = _Section(path, "", read_json(path), {})
    model_type = top.choice("model_type", "", ARCHITECTURES)
    family = top.section("text_config").choice("model_type", "llama", _TEXT_DEFAULTS)
    text = top.section("text_config", _TEXT_DEFAULTS[family])
    vision, feature_layers = _vision(top)
    decoder = _decoder(family, text, _is_tied(root, model_type, top, text))

    generation = text
    if (root / "generation_config.json").exists():
        path = file_inside(root, "generation_config.json")
        generation = _Section(path, "", read_json(path), {})

    def token(key: str) -> tuple[int, ...]:
        return generation.token_ids(key) or top.token_ids(key) or text.token_ids(key)

    image_key = "image_token_id" if "image_token_id" in top.values else "image_token_index"
    image_token = top.get(image_key, 32000)
    if type(image_token) is not int or not 0 <= image_token < decoder.vocab_size:
        raise top.error(image_key, image_token, f"a token id below the vocab_size {decoder.vocab_size}")

    return LlavaConfig(
        model_type=model_type,
        vision=vision,
        decoder=decoder,
        image_token_id=image_token,
        feature_layers=feature_layers,
        feature_select=top.choice("vision_feature_select_strategy", "default", ("default", "full")),
        projector_activation=top.activation("projector_hidden_act", "gelu"),
        projector_bias=top.flag("multimodal_projector_bias", True),
        grid_pinpoints=_pinpoints(top, vision) if model_type == "llava_next" else (),
        bos_token_id=next(iter(token("bos_token_id")), None),
        pad_token_id=next(iter(token("pad_token_id")), None),
        eos_token_ids=token("eos_token_id"),
    )


def _vision(top: _Section) -> tuple[VisionConfig, tuple[int, ...]]:
    absent = top.get("vision_config") is None
    section = top.section("vision_config", _VISION_DEFAULTS | (_VISION_ABSENT if absent else {}))
    section.choice("model_type", "clip_vision_model", ["clip_vision_model"])
    if section.integer("num_channels") != 3:
        raise section.error("num_channels", section.get("num_channels"), "3 (RGB images)")

    layers = section.integer("num_hidden_layers")
    value = top.get("vision_feature_layer", -2)
    wanted = value if isinstance(value, list) else [value]
    if not wanted or not all(type(i) is int and -layers - 1 <= i <= layers for i in wanted):
        expected = f"one or more of {-layers - 1}..{layers}, the hidden states of {layers} vision layers"
        raise top.error("vision_feature_layer", value, expected)
    feature_layers = tuple(i if i >= 0 else layers + 1 + i for i in wanted)

    image_size, patch_size = section.square("image_size"), section.square("patch_size")
    if image_size < patch_size:
        raise section.error("image_size", image_size, f"at least the patch_size {patch_size}")
    if image_size % patch_size:
        raise section.error("image_size", image_size, f"a multiple of the patch_size {patch_size}")
    vision = VisionConfig(
        hidden_size=section.integer("hidden_size"),
        intermediate_size=section.integer("intermediate_size"),
        num_layers=max(feature_layers),
        num_heads=section.integer("num_attention_heads"),
        image_size=image_size,
        patch_size=patch_size,
        layer_norm_eps=section.number("layer_norm_eps"),
        activation=section.activation("hidden_act", "quick_gelu"),
    )
    if vision.hidden_size % vision.num_heads:
        raise section.error("hidden_size", vision.hidden_size, f"a multiple of {vision.num_heads} heads")
    return vision, feature_layers


def _decoder(family: str, text: _Section, tie_embeddings: bool) -> DecoderConfig:
    hidden, heads = text.integer("hidden_size"), text.integer("num_attention_heads")
    kv_heads = heads if text.get("num_key_value_heads") is None else text.integer("num_key_value_heads")
    if heads % kv_heads:
        raise text.error("num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads")
    if text.get("head_dim") is not None:
        head_dim = text.integer("head_dim")
    elif hidden % heads:
        raise text.error("hidden_size", hidden, f"a multiple of the {heads} attention heads (or a head_dim)")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise text.error("head_dim", head_dim, "an even number: rotary positions turn pairs of channels")

    layers, max_positions = text.integer("num_hidden_layers"), text.integer("max_position_embeddings")
    _refuse_sliding_window(family, text, layers, max_positions)
    attention_bias = family == "llama" and text.flag("attention_bias", False)
    return DecoderConfig(
        family=family,
        vocab_size=text.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=text.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        rope=_rope(text, max_positions),
        max_positions=max_positions,
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family == "llama" and text.flag("mlp_bias", False),
        tie_embeddings=tie_embeddings,
        activation=text.activation("hidden_act", "silu"),
    )


def _refuse_sliding_window(family: str, text: _Section, layers: int, max_positions: int) -> None:
    """A window that never reaches its limit is no window; any other is refused."""
    if family == "llama" or text.get("sliding_window") is None:
        return
    if family == "qwen2":
        if not text.flag("use_sliding_window", False):
            return
        kinds = text.get("layer_types")
        windowed = "sliding_attention" in kinds if kinds else text.integer("max_window_layers", 0) < layers
        if not windowed:
            return
    window = text.integer("sliding_window")
    if window < max_positions:
        raise text.error(
            "sliding_window",
            window,
            f"null, or at least max_position_embeddings ({max_positions}): sliding-window attention is not "
            "supported. If no prompt will be longer than the window, lower max_position_embeddings to it",
        )


def _rope(text: _Section, max_positions: int) -> RopeConfig:
    # transformers 4: rope_theta beside rope_scaling; transformers 5: both inside rope_parameters.
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = text.section(key, {"rope_theta": text.get("rope_theta", 10_000.0)})
    name = "rope_type" if "rope_type" in rope.values or "type" not in rope.values else "type"
    kind = rope.choice(name, "default", ROPE_KINDS)
    partial = rope.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise text.error("partial_rotary_factor", partial, "1: rotating a part of each head is not supported")
    theta = rope.number("rope_theta")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind in ("linear", "dynamic"):
        return RopeConfig(theta=theta, kind=kind, factor=rope.number("factor"))

    original = text if text.get("original_max_position_embeddings") is not None else rope
    original_max = max_positions
    if original.get("original_max_position_embeddings") is not None:
        original_max = original.integer("original_max_position_embeddings")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.error("low_freq_factor", low, f"a number below high_freq_factor ({high})")
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=rope.number("factor"),
            original_max_positions=original_max,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    derived = rope.get("factor") is None
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=max_positions / original_max if derived else rope.number("factor"),
        original_max_positions=original_max,
        beta_fast=rope.optional_number("beta_fast") or 32.0,
        beta_slow=rope.optional_number("beta_slow") or 1.0,
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )


def _is_tied(folder: Path, model_type: str, top: _Section, text: _Section) -> bool:
    """Whether the output head is the embedding table.

    For LLaVA either level says so. For LLaVA-NeXT transformers 4 went by the text config and 5 goes by the
    top level, and both write both: where they disagree only the weights can tell.
    """
    outer, inner = top.flag("tie_word_embeddings", False), text.flag("tie_word_embeddings", False)
    if outer == inner or model_type == "llava":
        return outer or inner
    try:
        names = SafetensorsFolder(folder).tensors
    except CheckpointError:
        return outer  # there may be no weights yet; reading them will tell what is wrong
    return not any(name.endswith("lm_head.weight") for name in names)


def _pinpoints(top: _Section, vision: VisionConfig) -> tuple[tuple[int, int], ...]:
    value = top.get("image_grid_pinpoints")
    if value is None:
        return _PINPOINTS
    size = vision.image_size

    def fits(pair: Any) -> bool:
        return (
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(side) is int and side > 0 and side % size == 0 for side in pair)
        )

    if not isinstance(value, list) or not value or not all(fits(pair) for pair in value):
        expected = f"a list of [height, width] in pixels, multiples of the vision image_size {size}"
        raise top.error("image_grid_pinpoints", value, expected)
    return tuple((height, width) for height, width in value)


def write_config(config: LlavaConfig, folder: str | Path, dtype: str = "float32") -> None:
    """Writes `config.json` and `generation_config.json` as transformers 5 reads them; see `save_params`.

    The file describes the vision layers that are run, so `read_config` returns an equal config.

    Args:
      config: What to write.
      folder: Created if need be.
      dtype: What transformers shall load the weights as: float32, bfloat16 or float16.

    Raises:
      CheckpointError: if the decoder has biases that its family cannot have.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    single = len(config.feature_layers) == 1
    vision = config.vision
    tokens = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _eos(config),
        "pad_token_id": config.pad_token_id,
    }
    values = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "dtype": dtype,
        "image_seq_length": config.features_per_tile,
        "image_token_index": config.image_token_id,
        "model_type": config.model_type,
        "multimodal_projector_bias": config.projector_bias,
        "projector_hidden_act": config.projector_activation,
        "text_config": _text_values(config.decoder) | tokens,
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": {
            "hidden_act": vision.activation,
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "model_type": "clip_vision_model",
            "num_attention_heads": vision.num_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_size,
        },
        "vision_feature_layer": -1 if single else list(config.feature_layers),
        "vision_feature_select_strategy": config.feature_select,
    }
    if config.model_type == "llava_next":
        values["image_grid_pinpoints"] = [list(pair) for pair in config.grid_pinpoints]
    _write_json(root / "config.json", values)
    _write_json(root / "generation_config.json", {k: v for k, v in tokens.items() if v is not None})


def _eos(config: LlavaConfig) -> int | list[int] | None:
    ids = config.eos_token_ids
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


def _text_values(decoder: DecoderConfig) -> dict[str, Any]:
    biases = (decoder.qkv_bias, decoder.output_bias, decoder.mlp_bias)
    possible = {
        "llama": decoder.qkv_bias == decoder.output_bias,
        "mistral": not any(biases),
        "qwen2": biases == (True, False, False),
    }
    if not possible[decoder.family]:
        raise CheckpointError(
            f"a {decoder.family} config.json cannot say qkv_bias={biases[0]}, output_bias={biases[1]}, "
            f"mlp_bias={biases[2]}"
        )
    values = {
        "head_dim": decoder.head_dim,
        "hidden_act": decoder.activation,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "max_position_embeddings": decoder.max_positions,
        "model_type": decoder.family,
        "num_attention_heads": decoder.num_heads,
        "num_hidden_layers": decoder.num_layers,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_parameters": _rope_values(decoder.rope),
        "tie_word_embeddings": decoder.tie_embeddings,
        "vocab_size": decoder.vocab_size,
    }
    if decoder.family == "llama":
        return values | {"attention_bias": decoder.qkv_bias, "mlp_bias": decoder.mlp_bias}
    return values | {"sliding_window": None} | ({"use_sliding_window": False} if decoder.family == "qwen2" else {})


def _rope_values(rope: RopeConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind != "default":
        values["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        optional = {name: getattr(rope, name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
        values |= {name: value for name, value in optional.items() if value is not None}
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)
