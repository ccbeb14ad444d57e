"""How a decoder's weights lie: what `load` picks, loads straight into, saves from, and refuses."""

import dataclasses
import tracemalloc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import make_tiny_llava
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.models.decoder.layout import relaid
from vlcache_jax.models.families.llava.weights import WEIGHTS
from vlcache_jax.models.io.params_reader import load_params
from vlcache_jax.training import answer_loss

KINDS = {"plain": {}, "tied, biases": {"next": True, "family": "qwen2"}}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("layouts") / "checkpoint"
    make_tiny_llava(path, **KINDS[request.param])
    return path


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_one_device_loads_for_inference_and_changes_its_mind(folder, tmp_path, monkeypatch):
    found = vlc.load(folder, "float32")
    plain = vlc.load(folder, "float32", layout="stacked")
    assert (found.model.layout, plain.model.layout) == ("apart", "stacked")
    assert jax.tree.map(jnp.shape, found.params) == jax.tree.map(lambda x: x.shape, found.model.abstract_params())
    assert found.params["decoder"]["layers_0"]["attention"]["query_key_value"]["kernel"].shape[1] == 64
    assert_same(plain.with_layout("apart").params, found.params)
    assert_same(found.with_layout("stacked").params, plain.params)
    assert found.with_layout("apart") is found
    assert vlc.load(folder, "bfloat16", param_dtype="float32").model.layout == "stacked"  # to train
    assert vlc.load(folder, "float32", mesh=jax.make_mesh((2,), ("model",))).model.layout == "stacked"
    for platform, layout in (("gpu", "apart"), ("tpu", "stacked")):
        device = types.SimpleNamespace(platform=platform)
        monkeypatch.setattr("vlcache_jax.models.io.loading.default_device", lambda device=device: device)
        assert vlc.load(folder, "float32").model.layout == layout
    vlc.save(found, tmp_path)
    assert_same(vlc.load(tmp_path, "float32", layout="stacked").params, plain.params)


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_and_what_is_kept_are_the_same(tied):
    model, params = tiny_llava(qkv_bias=True, mlp_bias=True, tie_embeddings=tied)
    other, laid = relaid(params, model, "apart")
    assert ("lm_head" in params["decoder"], "lm_head" in laid["decoder"]) == (not tied, True)
    policy = vlc.VLCache(budget=0.4)
    outs = [
        vlc.generate(m, p, ragged_batch(), policy, 6, eos_token_ids=()) for m, p in ((model, params), (other, laid))
    ]
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    np.testing.assert_array_equal(outs[0].report.kept, outs[1].report.kept)


def test_loading_holds_no_second_copy(tmp_path, monkeypatch):
    size, layers = 256, 8
    name, members = "language_model.model.layers.{}.self_attn.{}_proj.weight", "qkv"
    values = {
        (i, p): np.full((size, size), 10 * i + members.index(p), np.float32) for i in range(layers) for p in members
    }
    save_file({name.format(*key): value for key, value in values.items()}, tmp_path / "model.safetensors")
    leaf = jax.ShapeDtypeStruct((layers, size, size), jnp.bfloat16)
    names = ("query", "key", "value")
    shapes = {"decoder": {"layers": {"attention": {name: {"kernel": leaf} for name in names}}}}
    fused = {"kernel": jax.ShapeDtypeStruct((size, 3 * size), jnp.bfloat16)}
    wanted = {"decoder": {f"layers_{i}": {"attention": {"_".join(names): fused}} for i in range(layers)}}
    # A device array may borrow the host's buffer on a CPU; a device-side copy shows what the host needs.
    original = jax.make_array_from_callback
    monkeypatch.setattr(jax, "make_array_from_callback", lambda s, d, cb: original(s, d, cb).copy())
    load_params(tmp_path, shapes, WEIGHTS, arranged=wanted)
    tracemalloc.start()
    params = load_params(tmp_path, shapes, WEIGHTS, arranged=wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for i in range(layers):
        kernel = params["decoder"][f"layers_{i}"]["attention"]["_".join(names)]["kernel"]
        np.testing.assert_array_equal(kernel[0].reshape(3, size)[:, 0], [10 * i, 10 * i + 1, 10 * i + 2])
    one = 3 * size * size * 2
    assert one <= peak < 1.5 * one  # of eight


def test_what_does_not_fit_is_refused(folder):
    with pytest.raises(vlc.InputError, match="layout='gpu' is not known: use one of stacked, apart"):
        vlc.load(folder, layout="gpu")
    with pytest.raises(vlc.InputError, match="layout='apart' is for one device, and a mesh was given"):
        vlc.load(folder, layout="apart", mesh=jax.make_mesh((2,), ("model",)))
    vlm = vlc.load(folder, "float32")
    with pytest.raises(vlc.InputError, match=r"lie for inference \(layout='apart'\): train with .*with_layout"):
        answer_loss(vlm.model)
    answer_loss(vlm.with_layout("stacked").model)
    with pytest.raises(
        vlc.CheckpointError,
        match=r"decoder/layers/attention/key/[a-z]+ is missing",
    ):
        vlc.save(dataclasses.replace(vlm, model=vlm.with_layout("stacked").model), folder.parent / "mixed")
