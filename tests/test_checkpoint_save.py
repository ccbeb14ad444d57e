"""What we save, transformers loads: no missing or unexpected keys, the same logits."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoint_models import MODELS, hand_built, make_model

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.llava.weights import WEIGHTS
from vlcache_jax.models.families.registry import read_config, write_config
from vlcache_jax.models.io.params_reader import load_params
from vlcache_jax.models.io.params_writer import save_params


def assert_equal(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)


def logits(model: Any) -> np.ndarray:
    """Of a prompt with one image (LLaVA-NeXT: a 32x32 one, in 2x2 tiles and an overview, with row breaks)."""
    generator = torch.Generator().manual_seed(0)
    tiles = 1 if model.config.model_type == "llava" else 5
    features = 16 if tiles == 1 else 16 + 8 * (8 + 1)
    pixels = torch.randn((tiles, 3, 16, 16), generator=generator)
    extra = {} if tiles == 1 else {"image_sizes": torch.tensor([[32, 32]])}
    ids = torch.cat([torch.tensor([1, 5, 6]), torch.full((features,), 60), torch.tensor([7, 8, 9])])[None]
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels if tiles == 1 else pixels[None], **extra).logits
    return out.numpy()


@pytest.mark.parametrize(
    ("model_type", "family", "text", "top"),
    [
        ("llava", "llama", {"attention_bias": True, "mlp_bias": True}, {}),
        ("llava", "mistral", {}, {"multimodal_projector_bias": False, "vision_feature_layer": [-2, 1]}),
        ("llava", "qwen2", {"tie_word_embeddings": True}, {}),
        ("llava_next", "llama", {}, {}),
        ("llava_next", "mistral", {}, {}),
        ("llava_next", "qwen2", {}, {"tie_word_embeddings": True}),
    ],
)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_loads_what_we_save(
    model_type: str, family: str, text: dict, top: dict, max_shard_bytes: int, tmp_path: Path
) -> None:
    model = make_model(model_type, family, text, **top)
    model.save_pretrained(tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    params = load_params(tmp_path / "theirs", Llava(config).abstract_params(), WEIGHTS)
    ours = tmp_path / "ours"
    save_params(params, ours, config, max_shard_bytes)
    write_config(config, ours)
    assert (len(list(ours.glob("*.safetensors"))) > 1) == (max_shard_bytes == 20_000)

    again, info = MODELS[model_type][1].from_pretrained(ours, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    np.testing.assert_allclose(logits(again.eval()), logits(model), atol=1e-5)
    back = read_config(ours)
    assert_equal(load_params(ours, Llava(back).abstract_params(), WEIGHTS), params)
    if "vision_feature_layer" not in top:  # else equal but for the numbering, which loses its negative form
        assert back.feature_layers == config.feature_layers == (2,)
    assert back.decoder == config.decoder
    assert back.vision == config.vision


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict, Any]:
    model = make_model("llava", "llama")
    model.save_pretrained(tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    return tmp_path / "ours", load_params(tmp_path / "theirs", Llava(config).abstract_params(), WEIGHTS), config


def test_dtypes_are_kept(saved: tuple[Path, dict, Any]) -> None:
    folder, params, config = saved
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    params["decoder"]["final_norm"] = {"scale": jnp.ones(32, jnp.float32)}
    save_params(params, folder, config)
    write_config(config, folder, "bfloat16")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert_equal(load_params(folder, abstract, WEIGHTS), params)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    again = MODELS["llava"][1].from_pretrained(folder, dtype="auto")
    assert again.model.multi_modal_projector.linear_1.weight.dtype == torch.bfloat16


def test_sharded_arrays_are_gathered(saved: tuple[Path, dict, Any]) -> None:
    folder, params, config = saved
    mesh = jax.make_mesh((8,), ("model",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "model"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    moved = jax.tree.map(lambda x: jax.device_put(x, spread if x.ndim == 3 else whole), params)
    save_params(moved, folder, config)
    assert_equal(load_params(folder, Llava(config).abstract_params(), WEIGHTS), params)


def test_saving_again_replaces_weights_and_leaves_nothing_else(saved: tuple[Path, dict, Any]) -> None:
    folder, params, config = saved
    save_params(params, folder, config)
    (folder / "notes.txt").write_text("mine")
    save_params(params, folder, config, max_shard_bytes=20_000)
    many = len(list(folder.iterdir()))
    assert many > 4
    assert not (folder / "model.safetensors").exists()
    zeros = jax.tree.map(jnp.zeros_like, params)
    save_params(zeros, folder, config, max_shard_bytes=40_000)
    assert_equal(load_params(folder, Llava(config).abstract_params(), WEIGHTS), zeros)
    save_params(params, folder, config)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "notes.txt"]
    assert_equal(load_params(folder, Llava(config).abstract_params(), WEIGHTS), params)


def test_a_failed_save_leaves_the_old_weights(saved: tuple[Path, dict, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, params, config = saved
    save_params(params, folder, config)
    before = (folder / "model.safetensors").read_bytes()

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="disk full"):
        save_params(jax.tree.map(jnp.zeros_like, params), folder, config, max_shard_bytes=20_000)
    assert [p.name for p in folder.iterdir()] == ["model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == before


def edited(params: dict, path: tuple[str, ...], value: Any) -> dict:
    if len(path) == 1:
        rest = {k: v for k, v in params.items() if k != path[0]}
        return rest if value is None else rest | {path[0]: value}
    return params | {path[0]: edited(params.get(path[0], {}), path[1:], value)}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("decoder", "extra"), jnp.ones(2), "decoder/extra has no place"),
        (("decoder", "final_norm", "scale"), jnp.ones(32, jnp.int8), "final_norm/scale has dtype int8"),
        (("decoder", "layers", "input_norm", "scale"), jnp.ones((3, 32)), "stacked over 3 layers, the config has 2"),
        (("decoder", "embed_tokens", "embedding"), jnp.ones((65, 32)), "65 rows, the config's vocab_size is 64"),
        (("decoder", "lm_head", "kernel"), None, "decoder/lm_head/kernel is missing"),
        (("decoder", "final_norm", "scale"), None, "decoder/final_norm/scale is missing"),
        (("image_newline",), jnp.ones(32), "image_newline has no place"),
    ],
)
def test_parameters_that_do_not_fit(path: tuple, value: Any, message: str, saved: tuple[Path, dict, Any]) -> None:
    folder, params, config = saved
    with pytest.raises(CheckpointError, match=message):
        save_params(edited(params, path, value), folder, config)
    assert not folder.exists() or not list(folder.iterdir())


def test_hand_built_numpy_parameters_can_be_saved(tmp_path: Path) -> None:
    model = make_model("llava_next", "mistral")
    model.save_pretrained(tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    save_params(hand_built(model), tmp_path / "ours", config)
    assert_equal(load_params(tmp_path / "ours", Llava(config).abstract_params(), WEIGHTS), hand_built(model))
