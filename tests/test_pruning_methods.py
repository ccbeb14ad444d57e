"""Every pruning method against its formula in NumPy, on ragged rows; and what all of them promise."""

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pruning_references
import pytest
from pruning_stub import BATCH, LAYERS, ROOM, Stub

import vlcache_jax as vlc
from vlcache_jax.pruning.grammar import pruning_by_name
from vlcache_jax.pruning.grid import grid_of
from vlcache_jax.pruning.method import METHODS, Between
from vlcache_jax.typing import ModelSpec

STUB = Stub()
METHOD_CASES = {
    "pyramid_drop": vlc.PyramidDrop((1, 4), (0.6, 0.25)),
    "fast_v": vlc.FastV(keep=0.3),
    "feather": vlc.Feather((1, 4), (0.3, 0.2), stride=3),
    "feather, plain": vlc.Feather((1, 4), (0.3, 0.2), stride=0),
    "vision_zip": vlc.VisionZip(keep=0.4, contextual=0.3),
    "vision_zip, small": vlc.VisionZip(keep=0.1),
    "div_prune": vlc.DivPrune(keep=0.3),
    "todre": vlc.ToDRE(keep=0.3, late=0.55),
    "aim": vlc.AIM(keep=0.3, first=2, last=4),
    "pi_to_me": vlc.PiToMe(keep=0.3),
    "pi_to_me, half": vlc.PiToMe(keep=0.7, margin=0.2),
    "token_correlation": vlc.TokenCorrelation(keep=0.5, threshold=0.3, partners=3),
    "sparse_vlm": vlc.SparseVLM((1, 4), (0.5, 0.3), recycle=0.9),
    "sparse_vlm, no recycling": vlc.SparseVLM((1, 4), (0.5, 0.3), recycle=0),
    "keep_curve": vlc.KeepCurve((1, 0.6, 0.6, 0.6, 0.25, 0.25)),
    "core_matching": vlc.CoreMatching(layer=4, keep=0.9),
    "core_matching, few": vlc.CoreMatching(layer=4, keep=0.2, reference=2),
    "v_flow_opt": vlc.VFlowOpt(keep=0.4, first=0.6, second=0.8, entropy=2.0, merge=5, layers=LAYERS),
    "v_flow_opt, nothing recycled": vlc.VFlowOpt(keep=0.3, entropy=-2.0, merge=0, layers=LAYERS),
    "cd_pruner": vlc.CDPruner(keep=0.3),
    "cd_pruner, relevance": vlc.CDPruner(keep=0.3, relevance=0.5),
}
CASES = [
    pytest.param(name.split(",")[0], method, cut, id=f"{name}, cut {cut}")
    for name, method in METHOD_CASES.items()
    for cut in range(len(method.cuts(LAYERS)))
]


def project_features(x):
    return x @ jnp.asarray(STUB.projector, x.dtype)


def behind(method, cut, stage, entered, prompt, tower):
    """The stage behind a cut."""
    neurons = entered.hidden @ jnp.asarray(STUB.gate[3], entered.hidden.dtype)
    watched = method.watch(entered, neurons) if method.watches else None
    seen = Between(stage, entered, prompt, STUB.project, tower, project_features, watched)
    choice, left = method.choose(cut, seen), jnp.sum(stage.droppable, axis=1, dtype=jnp.int32)
    visual = jnp.sum(prompt.droppable, axis=1, dtype=jnp.int32)
    count = method.kept(cut, visual, left) if choice.count is None else choice.count
    return stage.dropping(choice, count, method.protected(cut, stage.grid), stage.room, 1)


def parts(between):
    return between.stage, between.entered, between.prompt, between.tower


def test_every_method_has_a_case():
    assert {name.split(",")[0] for name in METHOD_CASES} == set(METHODS)
    assert all(inspect.isfunction(getattr(pruning_references, name)) for name in METHODS)


@pytest.mark.parametrize(("name", "method", "cut"), CASES)
def test_against_the_formula(name, method, cut):
    """The tokens that stay exactly, and their hidden states; behind the first cut some are gone already."""
    between = STUB.between(thinned=cut > 0)
    stage = jax.jit(partial(behind, method, cut))(*parts(between))
    for number in range(BATCH):
        row = STUB.row(between, number)
        kept, new = getattr(pruning_references, name)(method, row, cut)
        stays = [i for i in range(row.n) if i not in row.visual or i in kept]
        n = int(stage.lengths[number])
        assert np.asarray(stage.places)[number, :n].tolist() == row.places[stays].tolist()
        expected = np.stack([new.get(i, row.hidden[i]) for i in stays])
        np.testing.assert_allclose(np.asarray(stage.hidden)[number, :n], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(stage.vision_index)[number, :n], row.index[stays])
        np.testing.assert_array_equal(np.asarray(stage.positions)[number, :n], row.places[stays])
    assert stage.room <= ROOM


@pytest.mark.parametrize(("name", "method", "cut"), CASES)
def test_types(name, method, cut):
    """In bfloat16, and in 64-bit mode, without a promotion: what comes out has the types of what goes in."""
    arrays = parts(STUB.between(thinned=cut > 0))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, arrays)
    half = *half[:3], dataclasses.replace(half[3], attention=arrays[3].attention, entropy=arrays[3].entropy)
    types = [x.dtype for x in jax.tree.leaves(half[0])]
    with jax.enable_x64(True):
        out = jax.eval_shape(partial(behind, method, cut), *half)
    assert {x.dtype for x in jax.tree.leaves(out)} == set(types)


def test_rows_and_columns():
    """Of tiles, and of images of any size, whose features are in the order of the tower; NumPy and JAX alike."""
    text = {"tokens": np.zeros((1, 6), np.int32), "lengths": np.array([6], np.int32)}
    spec = ModelSpec(num_layers=1, num_kv_heads=1, head_dim=8, max_positions=9, dtype="float32", vision_grid=16)
    tiles = vlc.Batch(**text, vision_index=np.array([[-1, 0, 17, 256 + 33, -2, -1]], np.int32), pixels=np.zeros((1, 2)))
    cells = np.array([[0, 0, r, c] for r in (0, 2) for c in (2, 0) for _ in range(4)], np.int32)[None]
    images = dataclasses.replace(tiles, vision_index=np.array([[-1, 1, 0, 3, 2, -1]], np.int32), cells=cells)
    of_images = dataclasses.replace(spec, vision_grid=0, vision_merge=2)
    for numpy in (np, jnp):
        found = np.asarray(grid_of(spec, tiles, numpy))[0].T.tolist()
        assert found == [[-1] * 3, [0, 0, 0], [0, 1, 1], [1, 2, 1], [-1] * 3, [-1] * 3]
        found = np.asarray(grid_of(of_images, images, numpy))[0].T.tolist()
        assert found == [[-1] * 3, [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [-1] * 3]
    assert grid_of(dataclasses.replace(spec, vision_grid=0), tiles, np) is None


@pytest.mark.parametrize("name", list(METHODS))
def test_by_name(name):
    method = pruning_by_name(name)
    assert isinstance(method, METHODS[name])
    for layers in (4, 28, 32):
        cuts = method.of_model(layers).cuts(layers)
        assert cuts
        assert list(cuts) == sorted(set(cuts))
    keep = method.of_model(32).keep
    whole = "/".join("1" * len(keep)) if isinstance(keep, tuple) else "1"
    everything = f"{name},keep={whole}" + (",prune=0" if name == "aim" else "")
    assert not pruning_by_name(everything).of_model(32).cuts(32)
