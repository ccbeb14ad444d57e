"""Whatever number a file of a checkpoint holds: a named error at once, or a checkpoint that loads."""

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.json_text import parse_json
from vlcache_jax.files.limits import Range
from vlcache_jax.models.families.llava.layout import VisionLayout, agree_on_pinpoints
from vlcache_jax.models.families.registry import read_config
from vlcache_jax.models.images.transform import ImageTransform
from vlcache_jax.models.io.weights_folder import SafetensorsFolder

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
CONFIG: dict[str, Any] = {
    "model_type": "llava_next",
    "image_token_index": 4,
    "pad_token_id": 3,
    "vision_feature_layer": -2,
    "image_grid_pinpoints": [[32, 64], [64, 32]],
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": True,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": YARN,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_channels": 3,
        "image_size": 32,
        "patch_size": 8,
        "layer_norm_eps": 1e-5,
    },
}
OTHERS = {"partial_rotary_factor": 1.0, "rope_scaling": YARN, "original_max_position_embeddings": 512}
VALUES = (
    *("0", "-1", "1", "1000000000", "1" + "0" * 30, "1" + "0" * 400, "-1" + "0" * 5000, "1e308", "1e400", "-1e400"),
    *("1e-400", "NaN", "Infinity", "-Infinity", "true", "false", '"3"', '""', "[]", "[[]]", "{}", "null", "1.5"),
    *("[1e400]", "[NaN, NaN]", "[" + ",".join(["0"] * 20_000) + "]", "[" * 50_000, '"\\ud800"'),
)


def write(path: Path, header: Any, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def paths(values: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys of all numbers and lists in a config, one after another."""
    if isinstance(values, dict):
        return [path for key, value in values.items() for path in paths(value, (*prefix, key))]
    return [] if isinstance(values, str | bool) else [prefix]


def put(values: dict[str, Any], path: tuple[Any, ...], text: str) -> str:
    """The JSON of a config in which one value is replaced by a text."""
    copy = json.loads(json.dumps(values))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "@"
    return json.dumps(copy).replace('"@"', text)


def check(read: Any, keys: tuple[Any, ...], text: str) -> None:
    """`read` must be quick and need little memory, and name the key if it refuses the text."""
    start = time.process_time()
    tracemalloc.start()
    try:
        read()
    except CheckpointError as error:
        message = str(error)
        assert len(message) < 2000
        message.encode()
        assert any(str(key) in message for key in keys) or "nested" in message, message
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - start < 2, text[:50]
    assert peak < 50e6, text[:50]


CASES = [
    *((CONFIG, path) for path in paths(CONFIG)),
    *((CONFIG | {"text_config": CONFIG["text_config"] | {"rope_parameters": LLAMA3}}, p) for p in [
        ("text_config", "rope_parameters", key) for key in LLAMA3 if key != "rope_type"
    ]),
    *((CONFIG | {"text_config": CONFIG["text_config"] | OTHERS}, p) for p in [
        *(("text_config", key) for key in OTHERS), ("text_config", "rope_scaling", "factor")
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("config", "path"), CASES, ids=[".".join(path) for _, path in CASES])
def test_every_number_of_config_json(config: dict[str, Any], path: tuple[Any, ...], tmp_path: Path) -> None:
    for text in VALUES:
        (tmp_path / "config.json").write_text(put(config, path, text))
        check(lambda: read_config(tmp_path), path[-2:], text)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_every_number_of_generation_config_json(key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for text in VALUES:
        (tmp_path / "generation_config.json").write_text(put({}, (key,), text))
        check(lambda: read_config(tmp_path), (key, "generation_config.json"), text)


@pytest.mark.parametrize(
    "key", ["size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std", "image_grid_pinpoints"]
)
def test_every_number_of_preprocessor_config_json(key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    config = read_config(tmp_path)
    base = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}

    def read() -> None:
        try:
            values = parse_json(put(base, (key,), text))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        VisionLayout(agree_on_pinpoints(config, values.get("image_grid_pinpoints")), ImageTransform.from_dict(values))

    for value in VALUES:
        inside = (f'{{"height": {value}, "width": {value}}}', f'{{"shortest_edge": {value}}}') if "size" in key else ()
        for text in (value, *inside):
            check(read, (key, "tiles", "pixels"), text)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("text_config", "num_hidden_layers"), 10**9, "num_hidden_layers is 1000000000; expected a whole number"),
        (("text_config", "head_dim"), 10**9, "head_dim is 1000000000; expected a whole number from 2 to 4096"),
        (("vision_config", "num_hidden_layers"), 10**9, "vision_config.num_hidden_layers is 1000000000"),
        (("vision_feature_layer",), [-2] * 10**6, "vision_feature_layer is .*at most 64 of them"),
        (("image_grid_pinpoints",), [[32 * 10**6, 32]], "image_grid_pinpoints is .*at most 16384 pixels a side"),
        (("image_grid_pinpoints",), [[32 * 17, 32 * 17]], "image_grid_pinpoints is .*256 tiles"),
        (("image_grid_pinpoints",), [[32, 32]] * 1000, "image_grid_pinpoints is .*at most 256 of them"),
        (("vision_config", "patch_size"), True, "patch_size is True"),
        (("text_config", "rope_parameters", "rope_theta"), 1, "rope_theta is 1; expected a number from 1.001"),
        (("text_config", "rope_parameters", "beta_fast"), 1e308, r"beta_fast is 1e\+308; expected a number"),
        (("text_config", "rope_parameters", "factor"), 1e6, "factor is 1000000.0; expected a factor that extends"),
        (("text_config", "eos_token_id"), [64, 70], "eos_token_id is .64, 70.; expected an id below the vocab_size 64"),
        (("text_config", "partial_rotary_factor"), True, "partial_rotary_factor is True"),
        (("text_config", "layer_types"), 5, "layer_types is 5; expected a list"),
    ],
)  # fmt: skip
def test_limits_of_a_model(path: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(put(CONFIG, path, json.dumps(value)))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_limits_of_tensor_headers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers = [
        {"w": entry | {"shape": [3] * 10**6}},
        {"w": entry | {"shape": [1] * 9 + [2]}},
        {"w" * 10**6: entry},
        {"w": entry | {"shape": [10**30]}},
        {"w": entry | {"dtype": "F" * 10**6}},
        {"w": [[]] * 10**6},
        {"w": entry | {"data_offsets": [0, 10**25]}},
        b'{"w": {"dtype": "F32", "shape": [' + b"9" * 400 + b'], "data_offsets": [0, 8]}}',
        b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    ]
    for header in headers:
        write(path, header, b"\0" * 8)
        start = time.process_time()
        with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
            SafetensorsFolder(tmp_path)
        assert time.process_time() - start < 5
        assert len(str(caught.value)) < 2000
    write(path, b" " * (33 * 2**20))
    with pytest.raises(CheckpointError, match=r"a header of 34603008 bytes; at most 33554432 are read"):
        SafetensorsFolder(tmp_path)


def test_large_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b" " * (5 * 2**20))
    with pytest.raises(CheckpointError, match=r"config\.json has 5242880 bytes; at most 4194304 are read"):
        read_config(tmp_path)


def test_surrogates_of_an_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for text in (r'{"weight_map": {"a": "\ud800"}}', r'{"weight_map": {"\udc00": "a"}}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"not valid Unicode") as caught:
            SafetensorsFolder(tmp_path)
        str(caught.value).encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"b": [1, NaN]}}', r"^a\.b\[1\] is nan; expected a finite number"),
        ('{"a": -1e999}', "^a is -inf"),
        ("[" + "7" * 41 + "]", r"^\[0\] is 7777.*\(41 characters\); numbers have at most 40 digits"),
        ("Infinity", "^it is inf"),
        ('{"a": 1, "a": 2}', 'the key "a" occurs twice, with different values'),
        ('{"a": 1, "a": true}', "occurs twice"),
        ("[" * 33 + "1" + "]" * 33, "nested more than 32 levels deep"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff", "utf-8"),
        ('["\\ud800"]', "not valid Unicode"),
        ("", "Expecting value"),
    ],
)
def test_json_is_read_strictly(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_that_means_one_thing_is_read() -> None:
    text = '{"a": [1, -2.5, "\\ud83d\\ude42", null], "b": 1000000000000000019884624838656, "c": {}, "d": 1, "d": 1}'
    assert parse_json(text) == json.loads(text)
    assert parse_json("[" * 32 + "]" * 32) == json.loads("[" * 32 + "]" * 32)
    assert parse_json("-" + "9" * 40) == -int("9" * 40)


def test_ranges() -> None:
    assert 1 in Range(1, 2)
    assert 2.0 in Range(1, 2)
    assert not any(value in Range(1, 2) for value in (0, 2.1, float("nan"), "1", None, [1]))
    assert str(Range(1, 2**20)) == "from 1 to 1048576"


def test_many_unknown_tensors_are_told_at_once(tmp_path: Path) -> None:
    import numpy as np

    from vlcache_jax.models.families.llava.model import Llava
    from vlcache_jax.models.families.llava.weights import WEIGHTS
    from vlcache_jax.models.io.params_reader import load_params

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({f"junk.{i}" * 20: np.zeros(1, np.float32) for i in range(20_000)}, tmp_path / "model.safetensors")
    start = time.process_time()
    with pytest.raises(CheckpointError, match="20000 tensors that belong to no parameter") as caught:
        load_params(tmp_path, Llava(read_config(tmp_path)).abstract_params(), WEIGHTS)
    assert time.process_time() - start < 20
    assert len(str(caught.value)) < 20_000
