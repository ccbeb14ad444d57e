"""config.json of real checkpoints (transformers 4) and of transformers 5."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import transformers
from checkpoint_models import MODELS, TEXT, make_config
from config_files import LLAVA_15, changed, put

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig
from vlcache_jax.models.decoder.config_reader import TEXT_DEFAULTS
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.families.registry import read_config, write_config
from vlcache_jax.models.vision.config import VisionConfig

CLIP_L = VisionConfig(
    hidden_size=1024, intermediate_size=4096, num_layers=23, num_heads=16, image_size=336, patch_size=14
)


def test_llava_15_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    put(tmp_path, LLAVA_15, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001})
    assert read_config(tmp_path) == LlavaConfig(
        model_type="llava",
        vision=CLIP_L,
        decoder=DecoderConfig(
            family="llama",
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            rms_norm_eps=1e-5,
        ),
        image_token_id=32000,
        feature_layers=(23,),
        bos_token_id=1,
        pad_token_id=32001,
        eos_token_ids=(2,),
    )


def test_llava_next_mistral_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    text = {
        "model_type": "mistral",
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32064,
    }
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    put(tmp_path, LLAVA_15 | {"model_type": "llava_next", "text_config": text, "image_grid_pinpoints": pinpoints})
    config = read_config(tmp_path)
    assert config.grid_pinpoints == tuple(map(tuple, pinpoints))
    assert config.vision == CLIP_L
    assert config.decoder == DecoderConfig(
        family="mistral",
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e6),
        max_positions=32768,
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
def test_omitted_keys_have_transformers_defaults(model_type: str, family: str, tmp_path: Path) -> None:
    """Nothing but the types: compare with what the configuration classes make of the same file."""
    theirs = MODELS[model_type][0](text_config={"model_type": family}, image_token_index=7)
    minimal: dict[str, Any] = {"model_type": model_type, "text_config": {"model_type": family}, "image_token_index": 7}
    if family == "mistral":  # whose default is a sliding window, which is refused
        minimal["text_config"]["sliding_window"] = None
    config = read_config(put(tmp_path, minimal))
    text, vision = theirs.text_config, theirs.vision_config
    decoder = config.decoder
    assert isinstance(text, TEXT[family])
    assert (decoder.vocab_size, decoder.hidden_size, decoder.intermediate_size, decoder.num_layers) == (
        text.vocab_size,
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
    )
    assert (decoder.num_heads, decoder.num_kv_heads) == (text.num_attention_heads, text.num_key_value_heads)
    assert decoder.head_dim == text.hidden_size // text.num_attention_heads
    assert (decoder.max_positions, decoder.rms_norm_eps) == (text.max_position_embeddings, text.rms_norm_eps)
    assert decoder.rope == RopeConfig(theta=text.rope_parameters["rope_theta"])
    assert decoder.activation == text.hidden_act
    assert config.bos_token_id == text.bos_token_id
    assert config.eos_token_ids == (() if text.eos_token_id is None else (text.eos_token_id,))
    assert (config.vision.hidden_size, config.vision.intermediate_size) == (
        vision.hidden_size,
        vision.intermediate_size,
    )
    assert (config.vision.num_heads, config.vision.num_layers) == (
        vision.num_attention_heads,
        vision.num_hidden_layers - 1,
    )
    assert (config.vision.image_size, config.vision.patch_size) == (vision.image_size, vision.patch_size)
    assert config.grid_pinpoints == tuple(map(tuple, getattr(theirs, "image_grid_pinpoints", ())))
    assert config.projector_activation == theirs.projector_hidden_act

    # A vision config that is there but lacks keys has the defaults of the class, not those of LLaVA.
    minimal["vision_config"] = {"model_type": "clip_vision_model"}
    plain = transformers.CLIPVisionConfig()
    config = read_config(put(tmp_path, minimal))
    assert config.vision == VisionConfig(
        hidden_size=plain.hidden_size,
        intermediate_size=plain.intermediate_size,
        num_layers=plain.num_hidden_layers - 1,
        num_heads=plain.num_attention_heads,
        image_size=plain.image_size,
        patch_size=plain.patch_size,
        layer_norm_eps=plain.layer_norm_eps,
        activation=plain.hidden_act,
    )


def test_null_kv_heads_means_as_many_as_heads(tmp_path: Path) -> None:
    config = changed(LLAVA_15, "text_config.model_type", "mistral")
    config = changed(config, "text_config.sliding_window", None)
    assert read_config(put(tmp_path, config)).decoder.num_kv_heads == 8
    config = changed(config, "text_config.num_key_value_heads", None)
    assert read_config(put(tmp_path, config)).decoder.num_kv_heads == 32


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, RopeConfig(kind="linear", factor=2.0)),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, RopeConfig(kind="dynamic", factor=4.0)),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
            RopeConfig(theta=1e6, kind="linear", factor=2.0),
        ),
        ({"rope_parameters": {"rope_theta": 1e6}}, RopeConfig(theta=1e6)),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_positions=8192),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1, "mscale_all_dim": 0.5}},
            RopeConfig(kind="yarn", factor=4.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=0.5),
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": None,
                    "original_max_position_embeddings": 1024,
                    "beta_fast": 16,
                    "beta_slow": 2,
                    "attention_factor": 1.5,
                    "truncate": False,
                }
            },
            RopeConfig(
                kind="yarn",
                factor=4.0,
                original_max_positions=1024,
                beta_fast=16.0,
                beta_slow=2.0,
                attention_factor=1.5,
                truncate=False,
            ),
        ),
    ],
)
def test_rope_of_both_versions(text: dict, want: RopeConfig, tmp_path: Path) -> None:
    config = LLAVA_15 | {"text_config": LLAVA_15["text_config"] | text}
    rope = read_config(put(tmp_path, config)).decoder.rope
    assert rope == want
    # And what is written is read by both sides as the same.
    write_config(read_config(tmp_path), tmp_path)
    assert read_config(tmp_path).decoder.rope == want
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).text_config.rope_parameters
    assert theirs["rope_type"] == want.kind
    assert theirs["rope_theta"] == want.theta
    assert theirs.get("factor", 1.0) == want.factor


@pytest.mark.parametrize(
    ("value", "layers", "want", "used"),
    [
        (-2, 24, (23,), 23),
        (-1, 24, (24,), 24),
        (23, 24, (23,), 23),
        (0, 24, (0,), 0),
        (-25, 24, (0,), 0),
        ([-2], 24, (23,), 23),
        ([-13, 5, -2], 24, (12, 5, 23), 23),
    ],
)
def test_feature_layers_are_normalised(value: Any, layers: int, want: tuple, used: int, tmp_path: Path) -> None:
    config = changed(LLAVA_15, "vision_feature_layer", value)
    config = read_config(put(tmp_path, changed(config, "vision_config.num_hidden_layers", layers)))
    assert config.feature_layers == want
    assert config.vision.num_layers == used


@pytest.mark.parametrize(
    ("generation", "top", "text", "want"),
    [
        ({"eos_token_id": [2, 7]}, None, None, (2, 7)),
        ({"eos_token_id": 7}, 3, 4, (7,)),
        ({}, None, [4, 5], (4, 5)),
        ({"eos_token_id": None}, 3, None, (3,)),
        (None, None, 4, (4,)),
        (None, None, None, (2,)),
    ],
)
def test_end_tokens(generation: Any, top: Any, text: Any, want: tuple, tmp_path: Path) -> None:
    config = LLAVA_15
    if top is not None:
        config = changed(config, "eos_token_id", top)
    if text is not None:
        config = changed(config, "text_config.eos_token_id", text)
    assert read_config(put(tmp_path, config, generation)).eos_token_ids == want


def test_negative_pad_token_means_none(tmp_path: Path) -> None:
    assert read_config(put(tmp_path, changed(LLAVA_15, "pad_token_id", -1))).pad_token_id is None


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None, "head_dim": 16}),
        ("qwen2", {}),
    ],
)
def test_what_transformers_5_writes(model_type: str, family: str, text: dict, tmp_path: Path) -> None:
    tied = text.get("tie_word_embeddings", False)
    theirs = make_config(model_type, family, text, vision_feature_select_strategy="full", tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    decoder = config.decoder
    assert decoder.family == family
    assert decoder.head_dim == text.get("head_dim", 8)
    assert decoder.qkv_bias == (family == "qwen2" or text.get("attention_bias", False))
    assert (decoder.output_bias, decoder.mlp_bias) == (text.get("attention_bias", False), text.get("mlp_bias", False))
    assert decoder.tie_embeddings == tied
    assert config.feature_select == "full"
    assert config.features_per_tile == 17
    assert config.image_token_id == 60
    assert config.vision.num_layers == 2

    write_config(config, tmp_path / "ours")
    assert read_config(tmp_path / "ours") == config
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert again.vision_feature_layer == -1
    assert again.vision_config.num_hidden_layers == 2
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "tie_word_embeddings"):
        assert getattr(again.text_config, key) == getattr(theirs.text_config, key)
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["config.json", "generation_config.json"]


def test_write_config_refuses_biases_the_family_cannot_have(tmp_path: Path) -> None:
    config = read_config(put(tmp_path, LLAVA_15))
    odd = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, qkv_bias=True))
    with pytest.raises(CheckpointError, match=r"llama config\.json cannot say qkv_bias=True, output_bias=False"):
        write_config(odd, tmp_path / "ours")


def test_text_defaults_are_those_of_the_installed_transformers() -> None:
    for family, defaults in TEXT_DEFAULTS.items():
        kind = transformers.Qwen3Config if family == "qwen3" else TEXT[family]
        theirs = {field.name: field.default for field in dataclasses.fields(kind)}
        assert {key: theirs[key] for key in defaults} == defaults
