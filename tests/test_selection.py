"""Which tokens are kept, against a selection written with Python's sort."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_jax.cache.selection import candidates, select_layers
from vlcache_jax.policies.window import forced

BATCH, HEADS, LENGTH = 2, 2, 13
RECENTS = [0.0, 0.1, 0.29, 1.0]
quick = settings(max_examples=20, deadline=None, derandomize=True)


def expected(scores, length, slots, recent):
    """Kept positions of one head, ascending."""
    latest = max(1, round(recent * 100) * slots // 100)
    others = sorted(range(length - latest), key=lambda j: (-scores[j], j))
    return sorted([*others[: slots - latest], *range(length - latest, length)])


@functools.cache
def compiled(recent):
    def run(scores, positions, lengths, slots):
        stacked = (x[None] for x in (slots, *forced(slots, recent)))
        return select_layers(scores[None], positions[None], lengths, *stacked)[0][0]

    return jax.jit(run)


@functools.cache
def compiled_candidates(recent, count):
    def run(scores, lengths):
        return candidates(scores, lengths, count, *forced(jnp.full_like(lengths, count), recent))

    return jax.jit(run)


def everything():
    return jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, 1, LENGTH))


def kept(order, slots):
    """Lists of indices [batch][heads], after checking that nothing follows them."""
    entries = order.shape[-1]
    assert np.all(
        np.asarray(order)[np.arange(entries) >= np.asarray(slots)[:, None, None].repeat(order.shape[1], 1)] == entries
    )
    return [[order[b, h, : slots[b]].tolist() for h in range(order.shape[1])] for b in range(len(slots))]


@st.composite
def cases(draw):
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    levels = draw(st.sampled_from([2, 5, 1000]))  # few levels: many ties
    scores = (rng.integers(0, levels, (BATCH, HEADS, LENGTH)) / levels).astype(np.float32)
    lengths = np.array([draw(st.integers(1, LENGTH)) for _ in range(BATCH)], np.int32)
    slots = np.array([draw(st.integers(1, int(n))) for n in lengths], np.int32)
    return scores, lengths, slots, draw(st.sampled_from(RECENTS))


@quick
@given(case=cases(), padding=st.sampled_from([0.0, 9.0, np.nan, np.inf]))
def test_select(case, padding):
    scores, lengths, slots, recent = case
    dirty = np.where(np.arange(LENGTH) < lengths[:, None, None], scores, np.float32(padding))
    order = compiled(recent)(dirty, everything(), lengths, slots)
    assert order.shape == (BATCH, HEADS, LENGTH)
    for b, heads in enumerate(kept(order, slots)):
        for h, indices in enumerate(heads):
            assert indices == expected(scores[b, h], lengths[b], slots[b], recent)
            assert indices[-1] == lengths[b] - 1  # the last prompt token, always


@quick
@given(case=cases(), count=st.sampled_from([1, 4, 9, LENGTH]))
def test_candidates_contain_every_selection(case, count):
    """Selecting from the candidates is selecting from everything, for every number of slots up to their count."""
    scores, lengths, _, recent = case
    positions = compiled_candidates(recent, count)(scores, lengths)
    assert positions.shape == (BATCH, HEADS, count)
    assert np.all(np.diff(positions) > 0)
    handed_on = np.take_along_axis(scores, np.asarray(positions), axis=2)
    for slots in range(1, count + 1):
        slots = np.minimum(slots, lengths)
        order = kept(compiled(recent)(handed_on, positions, lengths, slots), slots)
        for b in range(BATCH):
            for h in range(HEADS):
                chosen = positions[b, h, np.array(order[b][h])].tolist()
                assert chosen == expected(scores[b, h], lengths[b], slots[b], recent)


def test_heads_that_share_their_selection():
    scores = np.random.default_rng(0).random((BATCH, 1, LENGTH), np.float32)
    lengths, slots = np.array([13, 8], np.int32), np.array([5, 8], np.int32)
    order = compiled(0.29)(scores, everything(), lengths, slots)
    assert order.shape == (BATCH, 1, LENGTH)
    for b in range(BATCH):
        assert kept(order, slots)[b][0] == expected(scores[b, 0], lengths[b], slots[b], 0.29)


@pytest.mark.parametrize(
    ("bad", "wanted"),
    [
        (np.nan, [3, 4, 11, 12]),  # ranks behind every number
        (-np.inf, [3, 4, 11, 12]),
        (np.inf, [0, 1, 11, 12]),  # ranks before every number, but behind the recent tokens
    ],
)
def test_scores_that_are_not_finite(bad, wanted):
    scores = np.zeros((BATCH, 1, LENGTH), np.float32)
    scores[..., :3] = bad
    scores[..., 3:5] = 1
    lengths, slots = np.full(BATCH, 13, np.int32), np.full(BATCH, 4, np.int32)
    order = compiled(0.5)(scores, everything(), lengths, slots)
    assert kept(order, slots)[0][0] == wanted


def test_nan_is_kept_before_padding():
    scores = np.full((BATCH, 1, LENGTH), np.nan, np.float32)
    lengths = np.array([6, 13], np.int32)
    order = compiled(0.1)(scores, everything(), lengths, lengths)
    assert kept(order, lengths)[0][0] == list(range(6))
