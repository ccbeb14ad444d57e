"""Pruning methods in whole models: what they are shown, and that rows stay what they are alone."""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from text_model import text_batch
from tiers import cases
from tiny_models import one_row, ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inference.forward import embed_prompt
from vlcache_jax.inputs import TEXT
from vlcache_jax.pruning.method import Pruning

LAYERS, NEW = 4, 5
METHODS = {
    "fast_v": vlc.FastV(keep=0.4),
    "feather": vlc.Feather((1, 3), (0.4, 0.3), stride=3),
    "vision_zip": vlc.VisionZip(keep=0.6, contextual=0.4),
    "cd_pruner": vlc.CDPruner(keep=0.4),
    "aim": vlc.AIM(keep=0.5),
    "pi_to_me": vlc.PiToMe(keep=0.4),
    "sparse_vlm": vlc.SparseVLM(recycle=0.6),
    "todre": vlc.ToDRE(keep=0.4, late=0.6),
    "token_correlation": vlc.TokenCorrelation(keep=0.4),
    "keep_curve": vlc.KeepCurve(budget=0.4),
    "core_matching": vlc.CoreMatching(layer=2, keep=0.7, reference=3),
    "v_flow_opt": vlc.VFlowOpt(keep=0.5, merge=4),
}


@pytest.fixture(scope="module")
def llava():
    return tiny_llava(layers=LAYERS)


@pytest.fixture(scope="module")
def batch():
    return ragged_batch(rows=4, length=64, seed=3)


@dataclasses.dataclass(frozen=True)
class ByEntrance(Pruning):
    """The largest first channel of what entered the last layer that ran."""

    looks_back: ClassVar[bool] = True

    def cuts(self, layers):
        return (1, 3)

    def kept(self, cut, visual, left):
        return left // 2

    def scores(self, cut, between):
        assert between.entered.room == between.stage.room
        return between.entered.hidden[..., 0]


def test_what_entered_the_last_layer(llava, batch):
    """A cut behind one layer, and another behind two more; counted in what is left."""
    model, params = llava
    ctx = vlc.prefill(model, params, batch, pruning=ByEntrance())
    kept = [np.asarray(ctx.kept_positions(layer))[:, 0] for layer in (0, 1, 3)]
    for row in (1,):
        alone = one_row(batch, row)
        hidden, places = embed_prompt(model, params, alone).hidden, np.arange(batch.lengths[row])
        visual = np.asarray(alone.vision_index)[0] != TEXT
        visual[-1] = False

        def attend(query, key, value, carry, xs):
            key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
            logits = jnp.einsum("bthd,bshd->bhts", query, key, precision="highest") / 8**0.5
            weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(logits.shape[2:], bool)), logits, -jnp.inf), axis=-1)
            return jnp.einsum("bhts,bshd->bthd", weights, value, precision="highest"), carry, None

        decode = jax.jit(
            lambda x, at, layers: model.apply({"params": params}, x, at, attend, layers=layers, method="decode")[0],
            static_argnums=2,
        )
        for entered, behind, found in (((0, 0), (0, 1), kept[1]), ((1, 2), (2, 3), kept[2])):
            last = decode(hidden, places[None], entered) if entered[1] > entered[0] else hidden
            after = decode(last, places[None], behind)
            order = sorted(np.flatnonzero(visual[places]), key=lambda i: -np.asarray(last)[0, i, 0])
            stays = np.sort([*np.flatnonzero(~visual[places]), *order[: len(order) // 2]]).astype(int)
            hidden, places = after[:, stays], places[stays]
            assert found[row][found[row] >= 0].tolist() == places.tolist()


def test_the_neurons_of_a_layer(llava, batch):
    """What goes into the last product of its MLP: the MLP's own formula, of the hidden states that they complete."""
    model, params = llava
    hidden = embed_prompt(model, params, batch).hidden
    places = np.broadcast_to(np.arange(batch.length), batch.tokens.shape)
    attend = lambda query, key, value, carry, xs: (query, carry, None)  # noqa: E731
    out, _, (_, (neurons,)) = model.apply(
        {"params": params}, hidden, places, attend, layers=(1, 2), neurons=lambda x: x, method="decode"
    )
    plain = model.apply({"params": params}, hidden, places, attend, layers=(1, 2), method="decode")[0]
    np.testing.assert_array_equal(out, plain)
    layer = jax.tree.map(lambda x: np.asarray(x[1], np.float64), params["decoder"]["layers"])
    neurons = np.asarray(neurons, np.float64)
    x = np.asarray(out, np.float64) - neurons @ layer["mlp"]["down"]["kernel"]
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * layer["post_attention_norm"]["scale"]
    gate, up = (x @ layer["mlp"][name]["kernel"] for name in ("gate", "up"))
    np.testing.assert_allclose(neurons, gate / (1 + np.exp(-gate)) * up, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("siglip", [False, True])
def test_what_the_tower_says(siglip, batch):
    """Attention, keys and features of the tokens, against the formula in NumPy."""
    model, params = tiny_llava()
    if siglip:
        model = dataclasses.replace(
            model, config=dataclasses.replace(model.config, vision_type="siglip_vision_model", feature_select="full")
        )
        vision = params["vision"] | {"post_norm": None}
        vision["patch_embedding"] = vision["patch_embedding"] | {"bias": np.full(16, 0.01, np.float32)}
        vision["position_embedding"] = vision["position_embedding"][1:]
        params = params | {"vision": vision}
    assert model.spec.tower_attention == ("mean" if siglip else "class")
    embedded, plain = (embed_prompt(model, params, batch, tower) for tower in (True, False))
    np.testing.assert_array_equal(embedded.hidden, plain.hidden)
    assert plain.tower is None
    states = model.apply(
        {"params": params}, batch.pixels.reshape(-1, 16, 16, 3), method=lambda m, x: m.vision(x, (0, 1))
    )
    entered, left = np.split(np.asarray(states, np.float64), 2, axis=-1)
    layer = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["vision"]["layers"])
    x = entered - entered.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * layer["norm_1"]["scale"] + layer["norm_1"]["bias"]
    query, key = (
        (x @ layer["attention"][name]["kernel"] + layer["attention"][name]["bias"]).reshape(*x.shape[:2], 2, 8)
        for name in ("query", "key")
    )
    logits = np.einsum("nqhd,nkhd->nhqk", query, key) / 8**0.5
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    attention = weights.mean(axis=(1, 2)) if siglip else weights[:, :, 0, 1:].mean(axis=1)
    first, index = int(not siglip), np.asarray(batch.vision_index)
    for row in range(batch.size):
        at = np.flatnonzero(index[row] >= 0)
        for found, of_patches in (
            (embedded.tower.attention, attention),
            (embedded.tower.keys, key[:, first:].mean(axis=2)),
            (embedded.tower.features, left[:, first:]),
        ):
            expected = of_patches.reshape(batch.size, -1, *of_patches.shape[2:])[row, index[row, at]]
            np.testing.assert_allclose(np.asarray(found)[row, at], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pruning", cases(METHODS, ("vision_zip",)))
def test_a_row_alone(llava, batch, pruning):
    model, params = llava
    run = partial(vlc.generate, model, params, policy=vlc.VLCache(0.5), max_new_tokens=NEW, eos_token_ids=[])
    run = partial(run, pruning=dataclasses.replace(pruning, rooms=(56,) * len(pruning.of_model(LAYERS).cuts(LAYERS))))
    out = run(batch)
    assert np.asarray(out.report.finite).all()
    assert (np.asarray(out.report.stage_tokens)[:2, -1] < batch.lengths[:2]).all()
    for row in range(batch.size):
        alone = run(jax.tree.map(lambda x: np.asarray(x)[[row, 0, 0, 2]], batch))  # noqa: B023
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[row])
        np.testing.assert_array_equal(alone.report.kept[0], out.report.kept[row])
        np.testing.assert_array_equal(alone.report.stage_tokens[0], out.report.stage_tokens[row])


def test_what_cannot_work_says_so(llava, batch):
    model, params = llava
    for pruning, message in (
        (lambda: vlc.FastV(layer=0), "whole number from 1"),
        (lambda: vlc.CDPruner(relevance=1), "less than 1"),
        (lambda: vlc.Feather(keep=(0.2,)), "as many layers as fractions"),
        (lambda: vlc.VisionZip(keep=1.2), "fraction from 0 to 1"),
    ):
        with pytest.raises(vlc.PolicyError, match=message):
            pruning()
    with pytest.raises(vlc.InputError, match="a row keeps"):
        vlc.prefill(model, params, batch, pruning=vlc.Feather((1, 2), rooms=(4, 4)))
    full = dataclasses.replace(model, config=dataclasses.replace(model.config, feature_select="full"))
    for pruning, message in (
        (vlc.VisionZip(), "attention of the vision tower"),
        (vlc.Feather(), r"Feather\(stride=0\)"),
    ):
        with pytest.raises(vlc.PolicyError, match=message):
            vlc.prefill(full, params, text_batch([9], 16), pruning=pruning)


@pytest.mark.thorough
@pytest.mark.parametrize("pruning", METHODS.values(), ids=list(METHODS))
def test_beside_a_pattern(llava, batch, pruning):
    """Pruning, sparse prefill and a compressed cache: a pattern that lists everything changes nothing."""
    model, params = llava
    run = partial(vlc.generate, model, params, batch, vlc.VLCache(0.5), NEW, eos_token_ids=[], pruning=pruning)
    plain, out = run(), run(prefill=vlc.AShape(8, 64, min_tokens=0, block=8))
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.report.kept, plain.report.kept)
    np.testing.assert_array_equal(out.report.stage_tokens, plain.report.stage_tokens)
    sparse = run(prefill=vlc.AShape(8, 8, min_tokens=0, block=8))
    assert np.asarray(sparse.report.finite).all()
    assert (np.asarray(sparse.report.prefill.density) < 1).any()
    if not isinstance(pruning, vlc.CoreMatching):  # how many it keeps depends on what the neurons say
        np.testing.assert_array_equal(sparse.report.stage_tokens, plain.report.stage_tokens)


@pytest.mark.thorough
@pytest.mark.parametrize("pruning", METHODS.values(), ids=list(METHODS))
def test_on_a_mesh(pruning):
    """The same tokens from rows on four devices and heads on two."""
    model, params = tiny_llava(layers=LAYERS, heads=8, kv_heads=4)
    batch = ragged_batch(rows=4, length=64, seed=3)
    run = partial(vlc.generate, model, policy=vlc.VLCache(0.5), max_new_tokens=NEW, eos_token_ids=[], pruning=pruning)
    plain = run(params=params, batch=batch)
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    out = run(params=jax.device_put(params, NamedSharding(mesh, PartitionSpec())), batch=batch)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.report.kept, plain.report.kept)
