"""Writing `config.json` and `generation_config.json` for transformers 5."""

import json
from pathlib import Path
from typing import Any

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.writing import make_folder, write_text
from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.families.llava.defaults import ARCHITECTURES


def write_config(config: LlavaConfig, folder: str | Path, dtype: str = "float32") -> None:
    """Writes `config.json` and `generation_config.json` as transformers 5 reads them; see `save_params`.

    The file describes the vision layers that are run, so `read_config` returns an equal config.

    Args:
      config: What to write.
      folder: Created if need be.
      dtype: What transformers shall load the weights as: float32, bfloat16 or float16.

    Raises:
      CheckpointError: if the decoder has biases that its family cannot have.
      InputError: if a file cannot be written.
    """
    root = make_folder(folder)
    for name, text in config_files(config, dtype).items():
        write_text(root / name, text)


def config_files(config: LlavaConfig, dtype: str = "float32") -> dict[str, str]:
    """The texts of the files that `write_config` writes, by their names."""
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
    present = {name: value for name, value in tokens.items() if value is not None}
    return {
        name: json.dumps(of_file, indent=2, sort_keys=True) + "\n"
        for name, of_file in (("config.json", values), ("generation_config.json", present))
    }


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
