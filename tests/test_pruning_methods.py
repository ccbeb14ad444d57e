"""Every pruning method against its formula in NumPy, on ragged rows; and what all of them promise."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pruning_references
import pytest
from pruning_stub import BATCH, LAYERS, ROOM, Stub

import vlcache_jax as vlc
from vlcache_jax.pruning.grammar import pruning_by_name
from vlcache_jax.pruning.method import METHODS

STUB = Stub()
METHOD_CASES = {
    "pyramid_drop": vlc.PyramidDrop((1, 4), (0.6, 0.25)),
    "fast_v": vlc.FastV(keep=0.3),
    "feather": vlc.Feather((1, 4), (0.3, 0.2), stride=3),
    "feather, plain": vlc.Feather((1, 4), (0.3, 0.2), stride=0),
    "vision_zip": vlc.VisionZip(keep=0.4, contextual=0.3),
    "vision_zip, small": vlc.VisionZip(keep=0.1),
    "cd_pruner": vlc.CDPruner(keep=0.3),
    "cd_pruner, relevance": vlc.CDPruner(keep=0.3, relevance=0.5),
}
CASES = [
    pytest.param(name.split(",")[0], method, cut, id=f"{name}, cut {cut}")
    for name, method in METHOD_CASES.items()
    for cut in range(len(method.cuts(LAYERS)))
]


def dropped(method, cut, between):
    """The stage behind a cut."""

    @jax.jit
    def run(between_arrays):
        stage, entered, prompt, tower = between_arrays
        seen = type(between)(stage, entered, prompt, STUB.project, tower, between.project_features)
        choice, left = method.choose(cut, seen), jnp.sum(stage.droppable, axis=1, dtype=jnp.int32)
        visual = jnp.sum(prompt.droppable, axis=1, dtype=jnp.int32)
        count = method.kept(cut, visual, left) if choice.count is None else choice.count
        return stage.dropping(choice, count, method.protected(cut, stage.grid), stage.room, 1)

    return run((between.stage, between.entered, between.prompt, between.tower))


def test_every_method_has_a_case():
    assert {name.split(",")[0] for name in METHOD_CASES} == set(METHODS)
    assert all(inspect.isfunction(getattr(pruning_references, name)) for name in METHODS)


@pytest.mark.parametrize(("name", "method", "cut"), CASES)
def test_against_the_formula(name, method, cut):
    """The tokens that stay exactly, and their hidden states; behind the first cut some are gone already."""
    between = STUB.between(thinned=cut > 0)
    stage = dropped(method, cut, between)
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


@pytest.mark.parametrize("name", list(METHODS))
def test_by_name(name):
    method = pruning_by_name(name)
    assert isinstance(method, METHODS[name])
    assert list(method.cuts(32)) == sorted(set(method.cuts(32)))
    keep = method.keep
    whole = "/".join("1" * len(keep)) if isinstance(keep, tuple) else "1"
    assert not pruning_by_name(f"{name},keep={whole}").cuts(32)
