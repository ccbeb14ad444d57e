"""LoRA: the formula, training of adapters alone, and folders in PEFT's format."""

import dataclasses
import json
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import make_tiny_llava

import vlcache_jax as vlc
from vlcache_jax.models.families.registry import FAMILIES
from vlcache_jax.models.io.rules import LINEAR
from vlcache_jax.models.linear import Linear
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.training.adapter_folder import load_adapters, save_adapters
from vlcache_jax.training.examples import make_train_batch
from vlcache_jax.training.lora import Lora
from vlcache_jax.training.loss import answer_loss
from vlcache_jax.training.parts import merge
from vlcache_jax.training.state import init_state, make_train_step

HERE = Path(__file__).parent / "peft_adapters"
ALL = ("decoder/layers", "projector", "vision/layers")
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model of transformers, the same loaded here, a batch of prompts)."""
    folder = tmp_path_factory.mktemp("model")
    reference = make_tiny_llava(folder)
    vlm = vlc.load(folder, dtype="float32", layout="stacked")
    return reference, vlm, vlm.processor(images=[[IMAGE]], text=["<image> w1 w2 w3"])


@partial(jax.jit, static_argnums=0)
def forward(model, params, batch):
    return model.apply({"params": params}, batch, method="forward")


def logits(vlm, params, batch):
    return np.asarray(forward(vlm.model, params, batch))[0, : int(batch.lengths[0])]


def changed(adapters, seed=0):
    """With other numbers than zeros in `lora_b`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), adapters)


def test_new_adapters_change_nothing_and_lie_beside_every_kernel(tiny):
    _, vlm, batch = tiny
    lora = Lora(rank=4, targets=ALL)
    adapters = lora.init(vlm.model, vlm.params)
    flat, params = flatten_dict(adapters), flatten_dict(vlm.params)
    assert len(flat) == 2 * (7 + 2 + 6)
    for path, x in flat.items():
        kernel = params[(*path[:-1], "kernel")].shape
        wanted = (*kernel[:-1], 4) if path[-1] == "lora_a" else (*kernel[:-2], 4, kernel[-1])
        assert (x.shape, x.dtype) == (wanted, np.float32)
        assert (np.abs(x).max() <= kernel[-2] ** -0.5) if path[-1] == "lora_a" else not np.any(x)
    plain = logits(vlm, vlm.params, batch)
    np.testing.assert_array_equal(logits(vlm, lora.applied(merge(vlm.params, adapters)), batch), plain)
    jax.tree.map(np.testing.assert_array_equal, lora.merged(merge(vlm.params, adapters)), vlm.params)


def test_adapters_beside_kernels_are_those_merged_into_them(tiny):
    """W + scale * A B, by hand; the cache, too, is the merged model's."""
    _, vlm, batch = tiny
    lora = Lora(rank=2, alpha=3, targets=ALL)
    params = merge(vlm.params, changed(lora.init(vlm.model, vlm.params)))
    merged, flat = flatten_dict(lora.merged(params)), flatten_dict(params)
    for path, kernel in merged.items():
        if path[-1] == "kernel" and (*path[:-1], "lora_a") in flat:
            a, b = (np.asarray(flat[(*path[:-1], name)], np.float64) for name in ("lora_a", "lora_b"))
            np.testing.assert_allclose(kernel, np.asarray(flat[path], np.float64) + 1.5 * a @ b, atol=1e-6)
    beside, inside = lora.applied(params), lora.merged(params)
    np.testing.assert_allclose(logits(vlm, beside, batch), logits(vlm, inside, batch), atol=2e-5)
    assert np.abs(logits(vlm, inside, batch) - logits(vlm, vlm.params, batch)).max() > 0.1
    cached = vlc.prefill(vlm.model, beside, batch).logits[0]  # as any others
    np.testing.assert_allclose(cached, logits(vlm, inside, batch)[-1], atol=2e-5)


def test_training_adapters_alone_on_a_mesh(tiny):
    """Kernels of bfloat16 stay as they are; the state holds the adapters and nothing else."""
    _, vlm, _ = tiny
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vlm.params)
    batch = make_train_batch(vlm.processor, [[IMAGE]] * 4, ["<image> w1 w2"] * 4, ["w6 w7 w8"] * 4, 32)
    mesh = jax.make_mesh((2, 2, 2), ("data", "model", "fsdp"))
    base = jax.device_put(base, param_shardings(base, mesh))
    batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    lora, optimizer = Lora(rank=4, alpha=8), optax.adam(1e-2)
    model = dataclasses.replace(vlm.model, dtype=jnp.dtype("bfloat16"))
    state = init_state(lora.init(model, base), optimizer)
    sizes = sum(x.size for x in jax.tree.leaves(state)), sum(x.size for x in jax.tree.leaves(base))
    assert sizes[0] < sizes[1]
    step = make_train_step(lora.loss(answer_loss(model)), optimizer)
    before, losses = jax.tree.map(np.asarray, base), []
    for _ in range(8):
        state, metrics = step(state, batch, base)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, base, before)
    b = state.params["decoder"]["layers"]["mlp"]["down"]["lora_b"]
    assert b.dtype == jnp.float32
    assert np.any(b)
    assert state.params["decoder"]["layers"]["mlp"]["up"]["lora_b"].sharding.spec[-1] == "model"


def reference_logits(reference, vlm, batch, folder):
    """The model of transformers with W + scale * B A in place of each W, as the tensors' names say."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    state = {name: x.clone() for name, x in reference.state_dict().items()}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = next(
            (v for k, v in config.get("alpha_pattern", {}).items() if module.endswith(k)), config["lora_alpha"]
        )
        scale = alpha / (len(a) ** 0.5 if config["use_rslora"] else len(a))
        state[f"{module}.weight"] += scale * torch.from_numpy(tensors[name.replace("_A.", "_B.")] @ a)
    n = int(batch.lengths[0])
    pixels = torch.from_numpy(np.array(batch.pixels[0]).transpose(0, 3, 1, 2))
    inputs = {"input_ids": torch.from_numpy(np.array(batch.tokens[:, :n])).long(), "pixel_values": pixels}
    with torch.no_grad():
        return torch.func.functional_call(reference, state, (), inputs).logits[0].numpy()


@pytest.mark.parametrize("kind", ["plain", "patterns"])
def test_folders_of_peft(tiny, kind):
    """`peft_adapters/make_expected.py` wrote them: other ranks and alphas by module, layers without an adapter."""
    reference, vlm, batch = tiny
    lora, adapters = load_adapters(HERE / kind, vlm)
    found = logits(vlm, lora.applied(merge(vlm.params, adapters)), batch)
    expected = reference_logits(reference, vlm, batch, HERE / kind)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(expected - logits(vlm, vlm.params, batch)).max() > 0.01


def test_saved_folders_are_as_peft_would_write_them(tiny, tmp_path):
    reference, vlm, batch = tiny
    lora = Lora(rank=2, alpha=3, targets=ALL)
    adapters = changed(lora.init(vlm.model, vlm.params))
    save_adapters(tmp_path / "a", lora, adapters, vlm, "some/base")
    save_adapters(tmp_path / "a", lora, adapters, vlm, "some/base")  # again: the same kind
    names = load_file(HERE / "plain" / "adapter_model.safetensors")
    unused = ".vision_tower.encoder.layers.2."  # behind the layer whose features are used
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name: x.shape for name, x in saved.items()} == {k: x.shape for k, x in names.items() if unused not in k}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    modules = {name for name, _ in reference.named_modules() if re.fullmatch(config["target_modules"], name)}
    assert modules == {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in saved}

    expected = reference_logits(reference, vlm, batch, tmp_path / "a")
    np.testing.assert_allclose(logits(vlm, lora.merged(merge(vlm.params, adapters)), batch), expected, atol=2e-5)
    again, loaded = load_adapters(tmp_path / "a", vlm)
    assert (again.rank, again.alpha, again.scale) == (2, 3, 1.5)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    with pytest.raises(vlc.InputError, match="holds other adapters"):
        save_adapters(tmp_path / "a", Lora(rank=4), Lora(rank=4).init(vlm.model, vlm.params), vlm)
    with pytest.raises(vlc.InputError, match=r"projector/.* is no adapter"):
        save_adapters(tmp_path / "b", lora, adapters | {"projector": vlm.params["projector"]}, vlm)


def test_modules_of_all_families_have_the_names_that_peft_gives_them():
    recorded = json.loads((HERE / "modules.json").read_text())
    ours = {}
    for kind, family in FAMILIES.items():
        rules = [rule for rule in family.weights.rules if rule.path[-1] == "kernel" and rule.axes == LINEAR]
        names = {f"base_model.model.{family.weights.module(r.name.removesuffix('.weight'))}" for r in rules}
        ours[kind] = names
    kinds = {"llava_siglip": "llava", "smolvlm": "idefics3"}
    for kind, names in recorded.items():
        assert set(names) <= ours[kinds.get(kind, kind)], kind


def test_targets_and_numbers_that_are_none(tiny):
    _, vlm, _ = tiny
    with pytest.raises(vlc.InputError, match=r"target 'decoder/embed' names no linear layer.*decoder/layers"):
        Lora(targets=("decoder/embed",)).init(vlm.model, vlm.params)
    apart = vlm.with_layout("apart")
    with pytest.raises(vlc.InputError, match="stacked"):
        Lora().init(apart.model, apart.params)
    adapted = dataclasses.replace(vlm, params=merge(vlm.params, Lora(rank=1).init(vlm.model, vlm.params)))
    with pytest.raises(vlc.InputError, match="hold adapters"):
        adapted.with_layout("apart")
    for wrong in (
        {"rank": 0},
        {"rank": 1.5},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"targets": "decoder"},
        {"dropout": 1},
    ):
        with pytest.raises(vlc.InputError, match=next(iter(wrong))):
            Lora(**wrong)


WRONG = {
    "peft_type": ("IA3", "peft_type"),
    "use_dora": (True, "use_dora"),
    "modules_to_save": (["lm_head"], "modules_to_save"),
    "bias": ("all", "bias"),
    "init_lora_weights": ("pissa", "unchanged kernels"),
    "r": (-1, r"r is -1"),
    "lora_alpha": ("big", "lora_alpha"),
    "alpha_pattern": ({"(a+)+$": 3}, "alpha_pattern"),
    "lora_dropout": (2, "lora_dropout is 2"),
}


@pytest.mark.parametrize("key", WRONG)
def test_configs_that_are_not_read(tiny, tmp_path, key):
    folder = shutil.copytree(HERE / "plain", tmp_path / "a")
    value, message = WRONG[key]
    config = json.loads((folder / "adapter_config.json").read_text()) | {key: value}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(vlc.CheckpointError, match=message):
        load_adapters(folder, tiny[1])


def test_dropout_of_what_goes_into_an_adapter():
    """W x + scale * B A (mask * x / keep), by hand; another mask in every layer, and none without a key."""
    lora, rng = Lora(rank=2, alpha=3, dropout=0.25), np.random.default_rng(0)
    names = {"kernel": (64, 8), "lora_a": (64, 2), "lora_b": (2, 8)}
    of = {name: jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32) for name, shape in names.items()}
    params = lora.applied({"decoder": {"layers": {"up": of, "down": of}}}, jax.random.key(5))["decoder"]["layers"]
    x, masks = jnp.asarray(rng.normal(size=(4, 25, 64)), jnp.float32), []
    for name in params:
        for layer in range(3):
            one = {key: value[layer] for key, value in params[name].items()}
            out = Linear(8, use_bias=False, dtype=jnp.dtype("float32")).apply({"params": one}, x)
            masks.append(np.asarray(jax.random.bernoulli(one["lora_key"], 0.75, x.shape)))
            w, a, b = (np.asarray(of[part][layer], np.float64) for part in names)
            hidden = np.asarray(x, np.float64)
            expected = hidden @ w + 1.5 * (masks[-1] * hidden / 0.75) @ a @ b
            np.testing.assert_allclose(out, expected, atol=1e-4)
    assert all(abs(mask.mean() - 0.75) < 0.02 for mask in masks)
    assert len({mask.tobytes() for mask in masks}) == 6
    assert set(lora.applied({"up": of})["up"]) == set(names)


@pytest.mark.thorough
def test_training_with_dropout(tiny):
    """Adapters learn, every key leaves out other numbers, and the backward pass those of the forward pass."""
    _, vlm, _ = tiny
    batch = make_train_batch(vlm.processor, [[IMAGE]] * 4, ["<image> w1 w2"] * 4, ["w6 w7 w8"] * 4, 32)
    lora, optimizer = Lora(rank=4, targets=ALL, dropout=0.3), optax.adam(1e-2)
    model = dataclasses.replace(vlm.model, remat="layers")
    loss, plain = lora.loss(answer_loss(model)), dataclasses.replace(lora, dropout=0.0).loss(answer_loss(model))
    adapters = changed(lora.init(vlm.model, vlm.params))
    with pytest.raises(vlc.InputError, match=r"dropout=0.3.*make_train_step a seed"):
        make_train_step(loss, optimizer)(init_state(adapters, optimizer), batch, vlm.params)

    @jax.jit
    def value(adapters, key):
        return loss(merge(vlm.params, adapters), batch, key)[0]

    key = jax.random.key(3)
    gradient, rng = jax.jit(jax.grad(value))(adapters, key), np.random.default_rng(1)
    way = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32) / 1000, adapters)
    beyond, before = (
        value(jax.tree.map(jnp.add, adapters, way), key),
        value(jax.tree.map(jnp.subtract, adapters, way), key),
    )
    along = sum(jnp.vdot(g, w) for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(way)))
    np.testing.assert_allclose((beyond - before) / 2, along, rtol=2e-2)
    values = [float(value(adapters, jax.random.key(seed))) for seed in range(8)]
    assert len(set(values)) == 8
    assert min(values) < float(plain(merge(vlm.params, adapters), batch)[0]) < max(values)

    train = make_train_step(loss, optimizer, accumulate=2, seed=7)
    state, losses = init_state(jax.tree.map(jnp.copy, adapters), optimizer), []
    for _ in range(12):
        state, metrics = train(state, batch, vlm.params)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_dropout_is_nothing_to_answers_and_goes_into_the_folder(tiny, tmp_path):
    _, vlm, _ = tiny
    folder = shutil.copytree(HERE / "plain", tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_dropout": 0.05}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    lora, adapters = load_adapters(folder, vlm)
    plain, same = load_adapters(HERE / "plain", vlm)
    assert (lora.dropout, dataclasses.replace(lora, dropout=0.0)) == (0.05, plain)
    jax.tree.map(np.testing.assert_array_equal, adapters, same)
    save_adapters(tmp_path / "b", lora, adapters, vlm)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["lora_dropout"] == 0.05


def test_folders_of_peft_beside_codes(tiny, tmp_path):
    _, vlm, _ = tiny
    vlc.save(vlm, tmp_path)
    coded = vlc.load(tmp_path, dtype="float32", layout="stacked", weights="int8")
    jax.tree.map(
        np.testing.assert_array_equal, load_adapters(HERE / "plain", coded)[1], load_adapters(HERE / "plain", vlm)[1]
    )


def test_tensors_that_are_not_read(tiny, tmp_path):
    folder = shutil.copytree(HERE / "plain", tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    for change, message in (
        ({name.replace("lora_A", "lora_magnitude_vector"): tensors[name]}, "is no adapter of a linear layer"),
        ({name.replace("q_proj", "qkv_proj"): tensors[name]}, "is no adapter of a linear layer"),
        ({name: tensors[name][:1]}, r"shapes .* expected"),
        ({name.replace(".layers.0.", ".layers.7."): tensors[name]}, "in 3 layers"),
    ):
        save_file(tensors | change, file)
        with pytest.raises(vlc.CheckpointError, match=message):
            load_adapters(folder, tiny[1])
    file.unlink()
    with pytest.raises(vlc.CheckpointError, match=r"adapter_model.bin.*can run code"):
        load_adapters(folder, tiny[1])
