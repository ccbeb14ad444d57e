"""The vision tower against transformers' CLIPVisionModel on tiny random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from vlcache_jax.errors import InputError, VLCacheError
from vlcache_jax.models.activations import ACTIVATIONS, activation
from vlcache_jax.models.families.projector import Projector
from vlcache_jax.models.vision.clip import ClipVisionTower
from vlcache_jax.models.vision.config import VisionConfig

CONFIG = VisionConfig(hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, image_size=16, patch_size=4)
LINEAR = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}


def reference(act: str = "quick_gelu") -> transformers.CLIPVisionModel:
    torch.manual_seed(0)
    model = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            hidden_act=act,
        )
    ).eval()
    with torch.no_grad():  # norm scales of one and zero biases would hide mistakes
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 else 0.0))
    return model


def params_of(model: transformers.CLIPVisionModel) -> dict:
    """Written out by hand, independent of the checkpoint loader."""
    w = {k.removeprefix("vision_model."): v.numpy() for k, v in model.state_dict().items()}

    def stack(name: str, transpose: bool = False) -> np.ndarray:
        x = np.stack([w[f"encoder.layers.{i}.{name}"] for i in range(CONFIG.num_layers)])
        return x.swapaxes(1, 2) if transpose else x

    def dense(name: str) -> dict:
        return {"kernel": stack(f"{name}.weight", True), "bias": stack(f"{name}.bias")}

    def norm(name: str) -> dict:
        return {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    return {
        "patch_embedding": {"kernel": w["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)},
        "class_embedding": w["embeddings.class_embedding"],
        "position_embedding": w["embeddings.position_embedding.weight"],
        "pre_norm": {"scale": w["pre_layrnorm.weight"], "bias": w["pre_layrnorm.bias"]},
        "layers": {
            "norm_1": norm("layer_norm1"),
            "attention": {ours: dense(f"self_attn.{theirs}") for ours, theirs in LINEAR.items()},
            "norm_2": norm("layer_norm2"),
            "mlp": {"fc1": dense("mlp.fc1"), "fc2": dense("mlp.fc2")},
        },
    }


PIXELS = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_new", "relu"])
def test_every_hidden_state_equals_transformers(act: str) -> None:
    model = reference(act)
    with torch.no_grad():
        want = model(torch.from_numpy(PIXELS.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
    tower = ClipVisionTower(CONFIG.__class__(**{**CONFIG.__dict__, "activation": act}))
    params = params_of(model)
    got = jax.jit(lambda p, x: tower.apply({"params": p}, x, (0, 1, 2, 3)))(params, PIXELS)
    want = np.concatenate([h.numpy() for h in want], axis=-1)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
    # Order and a repeated last layer are the caller's.
    some = np.asarray(tower.apply({"params": params}, PIXELS, (3, 1)))
    np.testing.assert_allclose(some, np.concatenate([want[..., 96:], want[..., 32:64]], -1), atol=1e-5, rtol=1e-5)


def test_init_gives_the_documented_tree() -> None:
    tower = ClipVisionTower(CONFIG, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: tower.init(jax.random.key(0), jnp.asarray(PIXELS), (3,)))["params"]
    want = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params_of(reference()))
    assert jax.tree.structure(shapes) == jax.tree.structure(want)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), want)


def test_bfloat16_computes_in_bfloat16_and_is_close() -> None:
    params = params_of(reference())
    exact = ClipVisionTower(CONFIG).apply({"params": params}, PIXELS, (2,))
    low = ClipVisionTower(CONFIG, dtype=jnp.bfloat16).apply({"params": params}, PIXELS, (2,))
    assert low.dtype == jnp.bfloat16
    error = np.abs(np.asarray(low, np.float32) - exact)
    assert 0 < np.mean(error) < 0.02 * np.mean(np.abs(exact))


def test_position_ids_choose_rows_of_the_table() -> None:
    params = params_of(reference())
    tower = ClipVisionTower(CONFIG)
    full = tower.apply({"params": params}, PIXELS, (0,))
    # The lower right 2x3 patches. Hidden state 0 is local to a patch, so it must equal the full image's.
    rows = np.array([9, 10, 11, 13, 14, 15], np.int32)
    part = tower.apply({"params": params}, PIXELS[:, 8:, 4:], (0,), rows)
    np.testing.assert_allclose(part[:, 1:], full[:, 1 + rows], atol=1e-6)
    every = tower.apply({"params": params}, PIXELS, (3,), np.arange(16, dtype=np.int32))
    np.testing.assert_array_equal(every, tower.apply({"params": params}, PIXELS, (3,)))


def test_gradient_equals_attention_without_map_and_checkpoint() -> None:
    params = params_of(reference())
    model = reference().requires_grad_(True)
    tower = ClipVisionTower(CONFIG)
    grad = jax.jit(jax.grad(lambda p: (tower.apply({"params": p}, PIXELS, (3,)) ** 2).mean()))(params)
    out = model(torch.from_numpy(PIXELS.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states[-1]
    (out**2).mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad if p.grad is not None else torch.zeros_like(p))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grad, params_of(model))


@pytest.mark.parametrize(
    ("pixels", "layers", "rows", "message"),
    [
        (PIXELS, (4,), None, "0..3"),
        (PIXELS, (-1,), None, "0..3"),
        (PIXELS, (), None, "0..3"),
        (PIXELS[:, :8], (3,), None, "8x16"),
        (PIXELS[:, :7], (3,), np.arange(4), "patch size 4"),
        (PIXELS[:, :8], (3,), np.arange(7), r"needs \(8,\)"),
    ],
)
def test_refuses_what_does_not_fit(pixels, layers, rows, message) -> None:
    with pytest.raises(InputError, match=message):
        ClipVisionTower(CONFIG).init(jax.random.key(0), pixels, layers, rows)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_equal_transformers(name: str) -> None:
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    want = transformers.activations.ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(activation(name)(jnp.asarray(x)), want, atol=2e-6)


def test_unknown_activation_names_the_nearest_first() -> None:
    with pytest.raises(VLCacheError, match="'quick_gelo' is not supported; use one of: quick_gelu"):
        activation("quick_gelo")


@pytest.mark.parametrize("bias", [True, False])
def test_projector_equals_transformers(bias: bool) -> None:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(hidden_size=8, num_attention_heads=2),
        text_config=transformers.LlamaConfig(hidden_size=12, num_attention_heads=2),
        multimodal_projector_bias=bias,
        vision_feature_layer=[-2, -1],
    )
    theirs = LlavaMultiModalProjector(config)
    x = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    params: dict = {}
    for name in ("linear_1", "linear_2"):
        linear = getattr(theirs, name)
        params[name] = {"kernel": linear.weight.detach().numpy().T}
        if bias:
            params[name]["bias"] = linear.bias.detach().numpy()
    ours = Projector(hidden_size=12, use_bias=bias)
    shapes = jax.eval_shape(lambda: ours.init(jax.random.key(0), x))["params"]
    assert jax.tree.map(lambda s: s.shape, shapes) == jax.tree.map(lambda a: a.shape, params)
    with torch.no_grad():
        want = theirs(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours.apply({"params": params}, x), want, atol=1e-6)
