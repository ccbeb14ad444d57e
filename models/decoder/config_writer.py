"""Writing the text config of a `config.json`, as transformers 5 reads it for Llama, Mistral and Qwen2."""

from typing import Any

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig


def text_values(decoder: DecoderConfig) -> dict[str, Any]:
    biases = (decoder.qkv_bias, decoder.output_bias, decoder.mlp_bias)
    possible = {
        "llama": decoder.qkv_bias == decoder.output_bias,
        "mistral": not any(biases),
        "qwen2": biases == (True, False, False),
        "qwen3": decoder.qkv_bias == decoder.output_bias and not decoder.mlp_bias,
    }
    if not possible[decoder.family]:
        raise CheckpointError(
            f"a {decoder.family} config.json cannot say qkv_bias={biases[0]}, output_bias={biases[1]}, "
            f"mlp_bias={biases[2]}"
        )
    values = size_values(decoder) | {
        "hidden_act": decoder.activation,
        "model_type": decoder.family,
        "rope_parameters": rope_values(decoder.rope),
    }
    if decoder.family == "llama":
        return values | {"attention_bias": decoder.qkv_bias, "mlp_bias": decoder.mlp_bias}
    if decoder.family == "qwen3":
        return values | {"attention_bias": decoder.qkv_bias}
    return values | {"sliding_window": None} | ({"use_sliding_window": False} if decoder.family == "qwen2" else {})


def size_values(decoder: DecoderConfig) -> dict[str, Any]:
    """What every text config says alike."""
    return {
        "head_dim": decoder.head_dim,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "max_position_embeddings": decoder.max_positions,
        "num_attention_heads": decoder.num_heads,
        "num_hidden_layers": decoder.num_layers,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "tie_word_embeddings": decoder.tie_embeddings,
        "vocab_size": decoder.vocab_size,
    }


def rope_values(rope: RopeConfig) -> dict[str, Any]:
    """Rotary positions, as `rope_parameters` has them."""
    values: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.sections is not None:
        values["mrope_section"] = list(rope.sections)
    if rope.interleaved:
        values["mrope_interleaved"] = True
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


def token_values(config: Any) -> dict[str, Any]:
    """What a model's config says of its tokens, as `config.json` and `generation_config.json` have it."""
    ids = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(ids) if len(ids) > 1 else ids[0] if ids else None,
        "pad_token_id": config.pad_token_id,
    }
