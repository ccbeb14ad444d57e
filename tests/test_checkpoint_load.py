"""Loading what transformers saves: every family, every layout of names, shards, dtypes and devices."""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoint_models import hand_built, make_model, rename
from safetensors.torch import load_file, save_file

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.llava.weights import WEIGHTS
from vlcache_jax.models.families.registry import read_config
from vlcache_jax.models.io.params_reader import load_params
from vlcache_jax.models.io.weights_folder import SafetensorsFolder


def abstract(folder: Path) -> dict[str, Any]:
    """The real model's tree of shapes for the config in `folder`."""
    return Llava(read_config(folder)).abstract_params()


def assert_equal(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), got, want)


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Any]:
    model = make_model("llava", "llama")
    model.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
        ("mistral", {}),
        ("qwen2", {}),
    ],
)
def test_every_family_loads_exactly(model_type: str, family: str, text: dict, tmp_path: Path) -> None:
    model = make_model(model_type, family, text)
    model.save_pretrained(tmp_path)
    assert_equal(load_params(tmp_path, abstract(tmp_path), WEIGHTS), hand_built(model))


@pytest.mark.parametrize(("model_type", "level"), [("llava", "text"), ("llava_next", "top"), ("llava", "top")])
def test_tied_embeddings(model_type: str, level: str, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    model = make_model(model_type, "qwen2", text=tied if level == "text" else None, **(tied if level == "top" else {}))
    model.save_pretrained(tmp_path)
    params = load_params(tmp_path, abstract(tmp_path), WEIGHTS)
    assert "lm_head" not in params["decoder"]
    assert_equal(params, hand_built(model))

    # A redundant copy of the head is fine, a different one is not.
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal(
        load_params(tmp_path, abstract(tmp_path), WEIGHTS) if model_type == "llava" else params, hand_built(model)
    )
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings.*lm_head\.weight.*differ"):
        load_params(tmp_path, shapes_of(hand_built(model)), WEIGHTS)


def test_llava_next_that_ties_only_in_the_text_config_goes_by_the_weights(tmp_path: Path) -> None:
    model = make_model("llava_next", "qwen2", {"tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    assert not read_config(tmp_path).decoder.tie_embeddings  # transformers 5 goes by the top level
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")  # transformers 4 went by the text config
    assert read_config(tmp_path).decoder.tie_embeddings


def version_4(name: str) -> str:
    return re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)


def version_5(name: str) -> str:
    name = re.sub(r"^language_model\.lm_head", "lm_head", version_4(name))
    name = re.sub(r"^language_model\.model", "model.language_model", name)
    return re.sub(r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1", name)


@pytest.mark.parametrize("layout", [version_4, version_5])
@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
def test_both_layouts_of_names(layout: Any, model_type: str, tmp_path: Path) -> None:
    model = make_model(model_type, "mistral")
    model.save_pretrained(tmp_path)
    rename(tmp_path, layout)
    names = SafetensorsFolder(tmp_path).tensors
    probe = "vision_tower.vision_model.pre_layrnorm.weight"
    assert (probe if layout is version_4 else f"model.{probe}") in names
    assert ("lm_head.weight" in names) == (layout is version_5)
    assert_equal(load_params(tmp_path, abstract(tmp_path), WEIGHTS), hand_built(model))


def test_buffers_that_old_versions_saved_are_ignored(saved: tuple[Path, Any]) -> None:
    folder, model = saved
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    tensors["language_model.model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["language_model.model.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    assert_equal(load_params(folder, abstract(folder), WEIGHTS), hand_built(model))


def test_shards(tmp_path: Path) -> None:
    model = make_model("llava_next", "qwen2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_equal(load_params(tmp_path, abstract(tmp_path), WEIGHTS), hand_built(model))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes(stored: torch.dtype, wanted: str, tmp_path: Path) -> None:
    model = make_model("llava", "llama", dtype=stored)
    model.save_pretrained(tmp_path)
    params = load_params(tmp_path, abstract(tmp_path), WEIGHTS, dtype=wanted)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {wanted}
    want = jax.tree.map(lambda x: x.astype(jnp.dtype(wanted)).astype(np.float32), hand_built(model))
    assert_equal(params, want)


def test_dtype_none_keeps_each_leafs_own(saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    shapes = abstract(folder)
    shapes["projector"] = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16), shapes["projector"])
    params = load_params(folder, shapes, WEIGHTS)
    assert params["projector"]["linear_1"]["kernel"].dtype == jnp.bfloat16
    assert params["decoder"]["final_norm"]["scale"].dtype == jnp.float32


def test_eight_devices_read_only_their_own_parts(saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = saved
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    assert mesh.size == 8
    spec = jax.sharding.PartitionSpec

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        last = leaf.shape[-1]
        split = (*[None] * (len(leaf.shape) - 1), "data" if last % 4 == 0 and leaf.shape[-1] > 4 else None)
        if len(leaf.shape) == 3:
            split = (None, "model", "data")
        return jax.sharding.NamedSharding(mesh, spec(*split))

    shapes = abstract(folder)
    shardings = jax.tree_util.tree_map_with_path(place, shapes)
    asked: list[int] = []
    original = jax.make_array_from_callback

    def counting(shape: Any, sharding: Any, callback: Any) -> jax.Array:
        def wrapped(index: Any) -> np.ndarray:
            data = callback(index)
            asked.append(data.size * 8 // max(1, int(np.prod(shape))))
            return data

        return original(shape, sharding, wrapped)

    monkeypatch.setattr(jax, "make_array_from_callback", counting)
    params = load_params(folder, shapes, WEIGHTS, shardings=shardings)
    assert_equal(params, hand_built(model))
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)), params, shardings)
    kernel = params["decoder"]["layers"]["mlp"]["gate"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(2, 16, 12)}
    assert asked.count(1) >= 8 * 13  # 13 stacked kernels, of which each device asked for one eighth

    replicated = jax.sharding.NamedSharding(mesh, spec())
    everywhere = load_params(folder, shapes, WEIGHTS, shardings=replicated)
    assert_equal(everywhere, hand_built(model))
    assert len(everywhere["decoder"]["final_norm"]["scale"].sharding.device_set) == 8


def test_default_device_is_used(saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    with jax.default_device(jax.devices()[3]):
        params = load_params(folder, abstract(folder), WEIGHTS)
    assert {d for x in jax.tree.leaves(params) for d in x.devices()} == {jax.devices()[3]}
    params = load_params(folder, abstract(folder), WEIGHTS)
    assert {d for x in jax.tree.leaves(params) for d in x.devices()} == {jax.devices()[0]}


def test_the_host_never_holds_a_second_copy(tmp_path: Path) -> None:
    """Of what numpy allocates, which tracemalloc sees, only one parameter is alive at a time."""
    size, layers = 256, 8
    name = "language_model.model.layers.{}.self_attn.{}_proj.weight"
    tensors = {
        name.format(i, p): torch.full((size, size), float(i)) for i in range(layers) for p in ("q", "k", "v", "o")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    leaf = {"kernel": jax.ShapeDtypeStruct((layers, size, size), jnp.bfloat16)}
    shapes = {"decoder": {"layers": {"attention": dict.fromkeys(("query", "key", "value", "output"), leaf)}}}
    one = layers * size * size * 2
    # A device array may borrow the host's buffer on a CPU; a device-side copy shows what the host needs.
    original = jax.make_array_from_callback
    try:
        jax.make_array_from_callback = lambda s, d, cb: original(s, d, cb).copy()
        load_params(tmp_path, shapes, WEIGHTS)
        tracemalloc.start()
        params = load_params(tmp_path, shapes, WEIGHTS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        jax.make_array_from_callback = original
    assert float(params["decoder"]["layers"]["attention"]["value"]["kernel"][5, 0, 0]) == 5.0
    assert one <= peak < 1.5 * one  # all four together would be 4 * one


def test_everything_that_does_not_fit_is_reported_at_once(saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    shapes = abstract(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    tensors["language_model.model.layers.1.mlp.up_projection.weight"] = torch.ones(3)
    tensors["language_model.model.layers.2.mlp.up_proj.weight"] = torch.ones(48, 32)
    tensors["language_model.model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    tensors["multi_modal_projector.linear_1.weight"] = torch.ones(32, 17)
    tensors["language_model.model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    tensors["model.language_model.embed_tokens.weight"] = torch.ones(64, 32)
    tensors["image_newline"] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_params(folder, shapes, WEIGHTS)
    message = str(caught.value)
    for part in (
        str(folder),
        "1 missing tensors:",
        "language_model.model.layers.1.mlp.up_proj.weight",
        "may be what the file calls language_model.model.layers.1.mlp.up_projection.weight",
        "language_model.model.layers.2.mlp.up_proj.weight (the config describes 2 layers)",
        "self_attn.q_proj.bias (the config describes a model without it)",
        "image_newline (the config describes a model without it)",
        "multi_modal_projector.linear_1.weight: the config gives [32, 16], the file has [32, 17]",
        "language_model.model.norm.weight: I8",
        "language_model.model.embed_tokens.weight and model.language_model.embed_tokens.weight",
    ):
        assert part in message, part


def test_vocabulary_must_equal_the_configs(saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 65
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        load_params(folder, abstract(folder), WEIGHTS)
    assert "embed_tokens.weight: the config gives [65, 32], the file has [64, 32]" in str(caught.value)
    assert "lm_head.weight: the config gives [65, 32], the file has [64, 32]" in str(caught.value)


def test_no_data_are_read_before_the_check(saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved
    shapes = abstract(folder)
    shapes["projector"]["linear_1"]["kernel"] = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    monkeypatch.setattr(SafetensorsFolder, "view", lambda *_: pytest.fail("data read"))
    with pytest.raises(CheckpointError, match="linear_1"):
        load_params(folder, shapes, WEIGHTS)


def test_long_lists_are_cut(saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    save_file({"nothing": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"\.\.\. and \d+ more"):
        load_params(folder, abstract(folder), WEIGHTS)


def test_shardings_must_cover_the_tree(saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    with pytest.raises(ValueError, match="shardings lacks"):
        load_params(folder, abstract(folder), WEIGHTS, shardings={})
