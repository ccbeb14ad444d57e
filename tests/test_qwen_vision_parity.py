"""The vision towers of Qwen-VL against transformers on tiny random weights: images of several sizes in padded rows."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from text_decoders import sharpen

from vlcache_jax.errors import InputError
from vlcache_jax.kernels.attention import Mask, attention
from vlcache_jax.models.images.patches import cut_patches, patch_order
from vlcache_jax.models.vision.qwen import QwenVisionTower
from vlcache_jax.models.vision.qwen_config import QwenVisionConfig
from vlcache_jax.models.vision.windows import run_attention, runs_of

PATCH, BUCKET = 2, 104
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 3, "num_heads": 4, "output_size": 24}
ROWS = [[(6, 10), (2, 2), (4, 10)], [(8, 8)]]  # grids of the images of two rows, in patches


def qwen2():
    from transformers.models.qwen2_vl import modeling_qwen2_vl as theirs

    config = theirs.Qwen2VLVisionConfig(
        depth=3, embed_dim=32, hidden_size=24, mlp_ratio=2, num_heads=4, patch_size=PATCH, hidden_act="quick_gelu"
    )
    return theirs.Qwen2VisionTransformerPretrainedModel(config), QwenVisionConfig(patch_size=PATCH, **SIZES)


def qwen2_5():
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as theirs

    config = theirs.Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=PATCH, out_hidden_size=24,
        window_size=8, fullatt_block_indexes=[1],
    )  # fmt: skip
    own = {"activation": "silu", "rms_norms": True, "gated_mlp": True, "window": 4, "full_layers": (1,)}
    return theirs.Qwen2_5_VisionTransformerPretrainedModel(config), QwenVisionConfig(patch_size=PATCH, **SIZES, **own)


def qwen3():
    from transformers.models.qwen3_vl import modeling_qwen3_vl as theirs

    config = theirs.Qwen3VLVisionConfig(
        depth=3, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=PATCH, out_hidden_size=24,
        num_position_embeddings=25, deepstack_visual_indexes=[0, 2],
    )  # fmt: skip
    own = {"activation": "gelu_pytorch_tanh", "patch_bias": True, "table_side": 5, "deepstack_layers": (0, 2)}
    return theirs.Qwen3VLVisionModel(config), QwenVisionConfig(patch_size=PATCH, **SIZES, **own)


PATHS = {
    "norm1": ("norm_1",), "norm2": ("norm_2",), "attn.qkv": ("attention", "qkv"), "attn.proj": ("attention", "output"),
    "mlp.linear_fc1": ("mlp", "fc1"), "mlp.linear_fc2": ("mlp", "fc2"), "mlp.fc1": ("mlp", "fc1"),
    "mlp.fc2": ("mlp", "fc2"), "mlp.gate_proj": ("mlp", "gate"), "mlp.up_proj": ("mlp", "up"),
    "mlp.down_proj": ("mlp", "down"), "ln_q": ("norm",), "norm": ("norm",), "mlp.0": ("fc1",), "mlp.2": ("fc2",),
    "linear_fc1": ("fc1",), "linear_fc2": ("fc2",),
}  # fmt: skip


def params_of(model):
    """Written out by hand, independent of the checkpoint loader."""

    def of(path, modules):
        found = {}
        for name, module in modules[0].named_modules():
            if name not in PATHS or not hasattr(module, "weight"):
                continue
            weight = torch.stack([m.get_submodule(name).weight for m in modules])
            linear = weight.ndim == 3
            found[*path, *PATHS[name], "kernel" if linear else "scale"] = weight.swapaxes(1, 2) if linear else weight
            if getattr(module, "bias", None) is not None:
                found[*path, *PATHS[name], "bias"] = torch.stack([m.get_submodule(name).bias for m in modules])
        return found

    embed = model.patch_embed.proj
    flat = {("patch_embedding", "kernel"): embed.weight.permute(1, 2, 3, 4, 0)} | of(("layers",), model.blocks)
    flat |= {path: x[0] for path, x in of(("merger",), [model.merger]).items()}
    if embed.bias is not None:
        flat["patch_embedding", "bias"] = embed.bias
    if hasattr(model, "pos_embed"):
        flat["position_embedding",] = model.pos_embed.weight
        flat |= of(("deepstack",), model.deepstack_merger_list)
    return flax.traverse_util.unflatten_dict({path: x.detach().numpy().copy() for path, x in flat.items()})


def inputs(rows, merge=2, window=None, frames=1, seed=0):
    """Random images: pixels and cells, and of each image (row, first feature, index, their patches and grid)."""
    rng = np.random.default_rng(seed)
    pixels = np.full((len(rows), BUCKET, 3 * frames * PATCH**2), 7, np.float32)
    cells = np.full((len(rows), BUCKET, 4), -1, np.int32)
    images = []
    for row, grids in enumerate(rows):
        at = 0
        for number, (height, width) in enumerate(grids):
            order, plain = (patch_order(height, width, merge=merge, window=w) for w in (window, None))
            image = rng.normal(size=(frames, height * PATCH, width * PATCH, 3)).astype(np.float32)
            n = height * width
            pixels[row, at : at + n] = cut_patches(image, order.cells, PATCH)
            cells[row, at : at + n] = np.concatenate([np.full((n, 1), number), np.zeros((n, 1)), order.cells], axis=1)
            theirs = cut_patches(np.concatenate([image] * (2 // frames)), plain.cells, PATCH)
            images.append((row, at // merge**2, order.index, theirs, (1, height, width)))
            at += n
    return pixels, cells, images


def expected(model, images):
    with torch.no_grad():
        out = model(
            torch.from_numpy(np.concatenate([patches for *_, patches, _ in images])),
            grid_thw=torch.tensor([grid for *_, grid in images]),
        )
    stacks = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
    return torch.stack(stacks).numpy()


@pytest.mark.parametrize("make", [qwen2, qwen2_5, qwen3])
@pytest.mark.parametrize("frames", [1, 2])
def test_features_equal_transformers(make, frames):
    torch.manual_seed(0)
    model, config = make()
    sharpen(model)
    params = params_of(model)
    tower = QwenVisionTower(config)
    pixels, cells, images = inputs(ROWS, window=config.window, frames=frames)
    shapes = jax.eval_shape(lambda: tower.init(jax.random.key(0), pixels, cells))["params"]
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, params)
    features, deepstack = jax.jit(lambda *x: tower.apply({"params": x[0]}, *x[1:]))(params, pixels, cells)
    assert np.isfinite(features).all()
    found = features[None] if deepstack is None else np.concatenate([features[None], deepstack])
    want, at = expected(model, images), 0
    assert len(found) == len(want)
    assert want.std(axis=1).min() > 0.02  # features differ from token to token
    for row, start, index, *_ in images:  # tokens row by row, as prompts have them
        np.testing.assert_allclose(found[:, row, start + index], want[:, at : at + len(index)], atol=1e-5, rtol=0)
        at += len(index)
    assert at == want.shape[1]


def test_an_image_is_what_it_is_alone():
    """Whatever its row holds beside it, and wherever it lies in the bucket."""
    torch.manual_seed(0)
    model, config = qwen2_5()
    params, tower = params_of(sharpen(model)), QwenVisionTower(config)
    pixels, cells, _ = inputs(ROWS, window=config.window)
    run = jax.jit(lambda *x: tower.apply({"params": params}, *x)[0])
    whole = np.asarray(run(pixels, cells))
    first, n = 60, 44  # behind the first image of the first row
    alone_pixels, alone_cells = np.zeros_like(pixels), np.full_like(cells, -1)
    alone_pixels[1, :n], alone_cells[1, :n] = pixels[0, first : first + n], cells[0, first : first + n]
    alone_cells[1, :n, 0] -= 1
    alone = np.asarray(run(alone_pixels, alone_cells))
    np.testing.assert_allclose(alone[1, : n // 4], whole[0, first // 4 : (first + n) // 4], atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [5, 8, 21, 40])
def test_run_attention_equals_the_definition(length):
    rng = np.random.default_rng(length)
    query, key, value = (jnp.asarray(rng.normal(size=(2, length, 3, 4)), jnp.float32) for _ in range(3))
    runs = np.stack([np.repeat(np.arange(length), rng.integers(1, 9, length))[:length] for _ in range(2)])
    runs = runs_of(jnp.asarray(runs, jnp.int32))
    want = attention(query, key, value, Mask(causal=False, segments=runs, apart=True), implementation="reference")[0]
    np.testing.assert_allclose(run_attention(query, key, value, runs, 8), want, atol=1e-6)


def test_lowered_for_gpus_only_layers_are_a_loop():
    tower = QwenVisionTower(qwen2_5()[1])
    shapes = jax.eval_shape(lambda: inputs_of(4096))
    params = jax.eval_shape(tower.init, jax.random.key(0), *shapes)
    lowered = jax.jit(tower.apply).trace(params, *shapes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("stablehlo.while") == 1


def inputs_of(patches):
    return jnp.zeros((2, patches, 3 * PATCH**2)), jnp.zeros((2, patches, 4), jnp.int32)


def test_gradients_are_finite():
    """Through padding, too."""
    torch.manual_seed(0)
    model, config = qwen2_5()
    params, tower = params_of(sharpen(model)), QwenVisionTower(config)
    pixels, cells, _ = inputs(ROWS, window=config.window)
    grad = jax.jit(jax.grad(lambda p: tower.apply({"params": p}, pixels, cells)[0].mean()))(params)
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in jax.tree.leaves(grad))


@pytest.mark.parametrize(
    ("pixels", "cells", "message"),
    [
        ((1, 8, 11), (1, 8, 4), r"takes \[batch, patches, 12\] of images or \[batch, patches, 24\] of videos"),
        ((8, 12), (8, 4), r"pixels are \[8, 12\]"),
        ((1, 6, 12), (1, 6, 4), "6 patches do not divide into features of 4"),
        ((1, 8, 12), (1, 8, 3), r"pixels of \[1, 8, 12\] need \[1, 8, 4\]"),
    ],
)
def test_refuses_what_does_not_fit(pixels, cells, message):
    tower = QwenVisionTower(qwen2()[1])
    with pytest.raises(InputError, match=message):
        tower.init(jax.random.key(0), np.zeros(pixels, np.float32), np.zeros(cells, np.int32))
