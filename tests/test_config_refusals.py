"""config.json files that are refused, by the name and the value of what is wrong."""

from pathlib import Path
from typing import Any

import pytest
from config_files import LLAVA_15, changed, put

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.families.registry import read_config


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("mistral", {"sliding_window": 4096}),  # = max_position_embeddings
        ("mistral", {"sliding_window": 9999}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 32}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 32}),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 0}),
        ("llama", {"sliding_window": 8}),  # a Llama has none, whatever the file says
    ],
)
def test_windows_that_do_nothing_are_fine(family: str, text: dict, tmp_path: Path) -> None:
    text = LLAVA_15["text_config"] | {"model_type": family} | text
    assert read_config(put(tmp_path, LLAVA_15 | {"text_config": text})).decoder.family == family


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("mistral", {"sliding_window": 4095}),
        ("mistral", {"max_position_embeddings": 32768}),  # the default window is 4096
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 31}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"]}),
    ],
)
def test_sliding_windows_are_refused(family: str, text: dict, tmp_path: Path) -> None:
    text = LLAVA_15["text_config"] | {"model_type": family} | text
    with pytest.raises(CheckpointError, match=r"text_config\.sliding_window is \d+; expected null, or at least"):
        read_config(put(tmp_path, LLAVA_15 | {"text_config": text}))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "llava_nxt", r'model_type is "llava_nxt"; expected one of the supported llava_next, llava'),
        ("model_type", ..., "model_type is .*expected one of the supported"),
        ("model_type", ["llava"], "model_type is"),
        ("text_config.model_type", "gemma", r'text_config\.model_type is "gemma".*llama.*mistral.*qwen2'),
        ("vision_config.model_type", "pixtral", r"vision_config\.model_type .*clip_vision_model"),
        ("text_config", [1], r"text_config is \[1\]; expected an object"),
        ("text_config.hidden_size", 0, r"text_config\.hidden_size is 0; expected a whole number from 1 to"),
        ("text_config.hidden_size", 4095, r"text_config\.hidden_size is 4095; expected a multiple of the 32"),
        ("text_config.hidden_size", "4096", r'text_config\.hidden_size is "4096"'),
        ("text_config.hidden_size", 4096.0, r"text_config\.hidden_size is 4096\.0"),
        ("text_config.hidden_size", None, r"text_config\.hidden_size is None"),
        ("text_config.num_hidden_layers", -1, r"text_config\.num_hidden_layers is -1"),
        ("text_config.num_hidden_layers", True, r"text_config\.num_hidden_layers is True"),
        ("text_config.num_key_value_heads", 5, r"num_key_value_heads is 5; expected a divisor of the 32"),
        ("text_config.head_dim", 5, r"text_config\.head_dim is 5; expected an even"),
        ("text_config.vocab_size", 0, r"text_config\.vocab_size is 0"),
        ("text_config.intermediate_size", -3, r"text_config\.intermediate_size is -3"),
        ("text_config.max_position_embeddings", 0, r"text_config\.max_position_embeddings is 0"),
        ("text_config.rms_norm_eps", -1e-5, r"text_config\.rms_norm_eps is -1e-05; expected a number from 1e-20 to 1"),
        ("text_config.rms_norm_eps", float("nan"), r"text_config\.rms_norm_eps is nan"),
        ("text_config.rope_theta", 0, r"rope_theta is 0"),
        ("text_config.hidden_act", "silo", r'text_config\.hidden_act is "silo".*silu'),
        ("text_config.attention_bias", 1, r"text_config\.attention_bias is 1; expected true or false"),
        ("text_config.tie_word_embeddings", "yes", r'text_config\.tie_word_embeddings is "yes"'),
        ("text_config.eos_token_id", "2", r'text_config\.eos_token_id is "2"'),
        ("text_config.partial_rotary_factor", 0.5, r"partial_rotary_factor is 0\.5"),
        (
            "text_config.rope_scaling",
            {"type": "longrope"},
            r'rope_scaling\.type is "longrope"; expected one of the supported .*llama3',
        ),
        ("text_config.rope_scaling", {"rope_type": "mrope"}, r'rope_type is "mrope"; expected one of the supported'),
        ("text_config.rope_scaling", {"rope_type": "linear"}, r"rope_scaling\.factor is None"),
        ("text_config.rope_scaling", {"rope_type": "linear", "factor": -1}, r"rope_scaling\.factor is -1"),
        ("text_config.rope_scaling", "linear", r"text_config\.rope_scaling is"),
        ("text_config.rope_scaling", {"rope_type": "llama3", "factor": 8}, r"low_freq_factor is None"),
        (
            "text_config.rope_scaling",
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
            r"low_freq_factor is 4\.0; expected a number below high_freq_factor",
        ),
        ("vision_config.num_attention_heads", 15, r"vision_config\.hidden_size is 1024; expected a multiple of 15"),
        ("vision_config.num_channels", 1, r"vision_config\.num_channels is 1; expected 3"),
        (
            "vision_config.image_size",
            335,
            r"vision_config\.image_size is 335; expected a multiple of the patch_size 14",
        ),
        ("vision_config.image_size", [336, 14], r"vision_config\.image_size is \[336, 14\]"),
        ("vision_config.image_size", 7, r"vision_config\.image_size is 7; expected at least"),
        ("vision_config.patch_size", 0, r"vision_config\.patch_size is 0"),
        ("vision_config.hidden_act", "quickgelu", r'vision_config\.hidden_act is "quickgelu".*quick_gelu'),
        ("vision_config.layer_norm_eps", 0, r"vision_config\.layer_norm_eps is 0"),
        ("vision_feature_layer", 25, r"vision_feature_layer is 25; expected one or more of -25\.\.24"),
        ("vision_feature_layer", -26, r"vision_feature_layer is -26"),
        ("vision_feature_layer", [], r"vision_feature_layer is \[\]"),
        ("vision_feature_layer", [1, "2"], r"vision_feature_layer is"),
        (
            "vision_feature_select_strategy",
            "cls",
            r'vision_feature_select_strategy is "cls"; expected one of the supported .*full',
        ),
        ("image_token_index", 32064, r"image_token_index is 32064; expected a token id below the vocab_size 32064"),
        ("image_token_id", -1, r"image_token_id is -1"),
        ("projector_hidden_act", 5, r"projector_hidden_act is 5"),
        ("multimodal_projector_bias", None, r"multimodal_projector_bias is None"),
    ],
)
def test_nonsense_is_refused_by_name_and_value(path: str, value: Any, message: str, tmp_path: Path) -> None:
    put(tmp_path, changed(LLAVA_15, path, value))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "pinpoints", [[], [[336]], [[336, 0]], [[336, 340]], [[336, "672"]], "x", [336, 672], [[336, 672, 3]]]
)
def test_bad_pinpoints(pinpoints: Any, tmp_path: Path) -> None:
    put(tmp_path, LLAVA_15 | {"model_type": "llava_next", "image_grid_pinpoints": pinpoints})
    with pytest.raises(CheckpointError, match=r"image_grid_pinpoints is .*multiples of the vision image_size 336"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_files_that_are_no_json_object(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(put(tmp_path, text))
    put(tmp_path, LLAVA_15)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_config(tmp_path)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_config(tmp_path / "nowhere")
