"""Prompts that a policy has said twice: what the second time is, and that nothing else changes."""

import dataclasses
import math

import jax.numpy as jnp
import newer_references as newer
import numpy as np
import pytest
import reference_parts as reference
from stub_model import kept_sets
from tiers import later
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.parallel import ops
from vlcache_jax.pruning.stage import Stage

BUDGET = 0.4


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture(scope="module")
def batch():
    return ragged_batch(rows=2, length=40)


def test_the_second_time_is_a_text_that_goes_on(llava, batch):
    """Each row by itself: its embeddings twice, at positions that go on; scored by its own definition."""
    model, params = llava
    ctx = vlc.prefill(model, params, batch, vlc.KVzip(BUDGET, sinks=2))
    kept = kept_sets(ctx.start(4)[1])
    embedded = model.apply({"params": params}, batch, method="embed")

    def attend(query, key, value, carry, _):
        out, _ = ops.attention(vlc.Kernels(), query, key, value, with_lse=False)
        return out, carry, (query, key, value)

    for row, n in enumerate(batch.lengths):
        hidden = np.tile(np.asarray(embedded.hidden)[row, :n], (2, 1))[None]
        positions = np.arange(2 * n, dtype=np.int32)[None]
        computed = model.apply({"params": params}, hidden, positions, attend, method="decode")[2]
        query, key, value = (np.asarray(x, np.float64)[:, 0] for x in computed)
        index = batch.vision_index[row, :n]
        total = max(3, math.floor(4 * 3 * int(n) / 10))
        slots, scores = newer.kv_zip_of(query, key, value, index, total, 2)
        for layer, head in np.ndindex(3, 2):
            assert kept[layer][row][head] == reference.keep(scores[layer, head], slots[layer][head], 0, 2)


@pytest.mark.thorough
def test_logits_and_answers_are_those_of_a_prompt_said_once(llava, batch):
    model, params = llava
    once, twice = (vlc.prefill(model, params, batch, p) for p in (vlc.FullCache(), vlc.KVzip(0.999)))
    np.testing.assert_allclose(twice.logits, once.logits, atol=1e-5)
    np.testing.assert_array_equal(twice.next_position, once.next_position)
    np.testing.assert_array_equal(twice.report.prompt_lengths, batch.lengths)
    assert np.asarray(twice.report.kept).sum() >= 3 * batch.lengths.sum() - 3 * len(batch.lengths)


@pytest.mark.parametrize("axes", [3, *later(1)])
def test_repeated_and_once(axes):
    rng = np.random.default_rng(0)
    lengths, room = np.array([3, 5, 1], np.int32), 5
    inside = np.arange(room) < lengths[:, None]
    positions = np.minimum(np.arange(room), lengths[:, None] - 1)
    if axes == 3:
        positions = np.stack([positions, positions // 2, positions % 2], axis=1)
    stage = Stage(
        hidden=jnp.asarray(rng.normal(size=(3, room, 2))),
        positions=jnp.asarray(positions, jnp.int32),
        lengths=jnp.asarray(lengths),
        vision_index=jnp.asarray(np.where(inside, [[4, -1, 7, 8, -1]], -1), jnp.int32),
        blocks=jnp.asarray(np.where(inside, [[0, -1, 1, 1, -1]], -1), jnp.int32),
        layer_inputs=jnp.asarray(rng.normal(size=(2, 3, room, 2))),
    )
    after = jnp.asarray([7, 9, 11])
    twice = stage.repeated(after)
    np.testing.assert_array_equal(twice.lengths, 2 * lengths)
    for row, n in enumerate(lengths):
        first, second = slice(0, n), slice(n, 2 * n)
        for name in ("hidden", "vision_index", "blocks", "positions", "layer_inputs"):
            before, x = (np.asarray(getattr(s, name)) for s in (stage, twice))
            before, x = (y[:, row] if name == "layer_inputs" else y[row] for y in (before, x))
            axis = {"positions": -1, "layer_inputs": 1}.get(name, 0)
            wanted, found, again = (
                np.take(y, np.arange(2 * room)[s], axis=axis) for y, s in ((before, first), (x, first), (x, second))
            )
            np.testing.assert_array_equal(found, wanted)
            if name == "positions":
                wanted = wanted + int(after[row])
            if name == "blocks":
                wanted = np.where(wanted < 0, wanted, wanted + room)
            np.testing.assert_array_equal(again, wanted)
        assert np.all(np.asarray(twice.vision_index)[row, 2 * n :] == -1)
        assert np.all(np.asarray(twice.blocks)[row, 2 * n :] == -1)
    back = twice.once()
    assert back.said is None
    for name in ("lengths", "vision_index", "blocks"):
        np.testing.assert_array_equal(getattr(back, name), getattr(stage, name))
    np.testing.assert_array_equal(*(np.where(inside[..., None], s.hidden, 0) for s in (back, stage)))


def test_refused(llava, batch):
    model, params = llava
    for options in ({"prefill": vlc.AShape()}, {"pruning": vlc.PyramidDrop((1,), (0.5,))}):
        with pytest.raises(vlc.PolicyError, match=r"policy 'kv_zip' has prompts said twice, .* leave these out"):
            vlc.prefill(model, params, batch, vlc.KVzip(), **options)
    long = dataclasses.replace(ragged_batch(rows=1, length=200), lengths=np.array([130], np.int32))
    with pytest.raises(vlc.InputError, match="row 0 needs 260 positions but the model has 256"):
        vlc.prefill(model, params, long, vlc.KVzip())
    assert not vlc.KVzip(1.0).repeats
