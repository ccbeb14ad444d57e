"""Greedy and sampled tokens: the filters against numpy, the draws against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_jax.errors import InputError
from vlcache_jax.inference.next_token import filtered_logits, next_token
from vlcache_jax.inference.row_options import row_options
from vlcache_jax.inference.sampling import Sampling
from vlcache_jax.typing import ModelSpec

VOCAB = 12
SPEC = ModelSpec(num_layers=1, num_kv_heads=1, head_dim=1, max_positions=1, dtype=np.float32, eos_token_ids=(2,))
quick = settings(max_examples=25, deadline=None, derandomize=True)
_filtered = jax.jit(filtered_logits)
_next_token = jax.jit(next_token)


def options(rows, sampling, seeds=0):
    return row_options(SPEC, rows, 1, sampling, seeds, None)


def filtered(logits, sampling):
    o = options(len(logits), sampling)
    return _filtered(logits, o.temperature, o.top_k, o.top_p)


def allowed(logits, sampling):
    """bool [vocab] of one row, and whether rounding could decide otherwise (float64)."""
    z = np.asarray(logits, np.float64) / sampling.temperature
    keep, unsure = np.ones(len(z), bool), False
    if sampling.top_k is not None:
        keep &= z >= np.sort(z)[::-1][min(sampling.top_k, len(z)) - 1]
    if sampling.top_p is not None:
        p = np.where(keep, np.exp(z - z.max()), 0)
        p /= p.sum()
        mass, lowest = 0.0, 0.0
        for j in np.argsort(-p, kind="stable"):
            unsure |= abs(mass - sampling.top_p) < 1e-5
            if mass >= sampling.top_p:
                break
            mass, lowest = mass + p[j], z[j]
        keep &= z >= lowest
    return keep, unsure


@quick
@given(
    seed=st.integers(0, 1000),
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.5, 2.0]),
        top_k=st.sampled_from([None, 3, VOCAB, 99]),
        top_p=st.sampled_from([None, 0.3, 0.9, 1.0]),
    ),
    levels=st.sampled_from([4, 1000]),
)
def test_filters(seed, sampling, levels):
    logits = (np.random.default_rng(seed).integers(0, levels, (3, VOCAB)) * (6 / levels)).astype(np.float32)
    result = np.asarray(filtered(logits, sampling))
    for row in range(3):
        keep, unsure = allowed(logits[row], sampling)
        if not unsure:
            np.testing.assert_array_equal(np.isfinite(result[row]), keep)
        assert np.isfinite(result[row, logits[row].argmax()])
        finite = np.isfinite(result[row])
        np.testing.assert_allclose(result[row, finite], logits[row, finite] / sampling.temperature, rtol=1e-6)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0, 1, 2, 3]),
        (Sampling(top_k=1), [1]),
        (Sampling(top_k=2), [0, 1, 2]),  # ties with the second
        (Sampling(top_p=1e-6), [1]),  # at least one
        (Sampling(top_p=0.55), [0, 1, 2]),  # 0.5 does not reach it; the next two are tied
        (Sampling(top_p=1.0), [0, 1, 2, 3]),
        (Sampling(top_k=1, top_p=0.9), [1]),
    ],
)
def test_filter_examples(sampling, kept):
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.2, 0.1]]))
    assert np.flatnonzero(np.isfinite(filtered(logits, sampling)[0])).tolist() == kept


def test_greedy_takes_the_lowest_id_on_a_tie():
    logits = jnp.array([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -2.0, -3.0, -0.5]])
    tokens, *_ = next_token(logits, options(3, None), jnp.zeros(3, jnp.int32))
    assert tokens.tolist() == [1, 0, 3]
    assert tokens.dtype == jnp.int32


def compiled(sampling):
    def draw(logits, seeds, step):
        return _next_token(logits, options(len(logits), sampling, seeds), np.full(len(logits), step, np.int32))[0]

    return draw


def test_a_draw_depends_on_its_own_row_and_seed_only():
    rng = np.random.default_rng(0)
    logits, seeds = rng.normal(size=(8, VOCAB)).astype(np.float32), np.arange(8, dtype=np.int32) * 7 - 3
    draw = compiled(Sampling(temperature=3.0))
    together = np.asarray(draw(logits, seeds, 2))
    assert len(set(together.tolist())) > 1
    order = rng.permutation(8)
    np.testing.assert_array_equal(draw(logits[order], seeds[order], 2), together[order])
    for row in range(8):
        assert draw(logits[row : row + 1], seeds[row : row + 1], 2)[0] == together[row]
    np.testing.assert_array_equal(draw(logits, seeds, 2), together)  # and repeats


def test_seeds_and_steps_draw_differently():
    logits = np.zeros((64, VOCAB), np.float32)
    draw = compiled(Sampling())
    seeds = np.arange(64, dtype=np.int32)
    first = np.asarray(draw(logits, seeds, 0))
    for other in (draw(logits, seeds, 1), draw(logits, seeds + 64, 0)):
        assert 0 < np.mean(first == np.asarray(other)) < 0.3  # one in twelve agrees by chance


def test_every_row_its_own_way_in_one_program():
    rng = np.random.default_rng(1)
    ways = [None, Sampling(temperature=3.0), Sampling(top_k=2), Sampling(temperature=9.0, top_p=0.5), None]
    logits = rng.normal(size=(5, VOCAB)).astype(np.float32)
    compiled(None)(logits, 0, 0)
    before = _next_token._cache_size()
    for step in range(20):
        together = np.asarray(compiled(ways)(logits, np.arange(5), step))
        for row, way in enumerate(ways):
            alone = compiled([way] * 5)(logits, np.arange(5), step)
            assert alone[row] == together[row]
        np.testing.assert_array_equal(together[[0, 4]], logits[[0, 4]].argmax(axis=1))
    assert _next_token._cache_size() == before


def test_stop_ids_of_rows():
    assert row_options(SPEC, 2, 1, None, 0, None).stop_ids.tolist() == [[2, *[-1] * 7]] * 2
    assert row_options(SPEC, 2, 1, None, 0, []).stop_ids.tolist() == [[-1] * 8] * 2
    rows = row_options(SPEC, 3, 1, None, 0, [[7, 3], [], [5]])
    assert rows.stops(jnp.array([3, 3, 5])).tolist() == [True, False, True]
    assert row_options(SPEC, 1, 1, None, 0, range(9)).stop_ids.shape == (1, 16)
    for wrong in ([[1]] * 2, [[1]] * 4):
        with pytest.raises(InputError, match=r"eos_token_ids of . rows do not fit 3"):
            row_options(SPEC, 3, 1, None, 0, wrong)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (0.7, "sampling=0.7 is no vlc.Sampling"),
        ("greedy", "sampling='greedy' is no vlc.Sampling"),
        ([None, 0.7, None], "sampling=0.7 is no vlc.Sampling"),
        ([None] * 2, "2 samplings do not fit 3 rows"),
    ],
)
def test_what_is_no_sampling(sampling, message):
    with pytest.raises(InputError, match=message):
        row_options(SPEC, 3, 1, sampling, 0, None)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0.5), np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.8), [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
    ],
)
def test_frequencies(sampling, expected):
    rows = 4096
    logits = np.tile(np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32)), (rows, 1))
    tokens = compiled(sampling)(logits, np.arange(rows, dtype=np.int32), 0)
    seen, wanted = np.bincount(tokens, minlength=4), rows * np.array(expected)
    possible = wanted > 0
    assert not seen[~possible].any()
    chi_square = np.sum((seen - wanted)[possible] ** 2 / wanted[possible])
    assert chi_square < 16.3  # of 3 degrees of freedom: passed by 99.9 % of true samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0; for greedy decoding use sampling=None"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf must be finite"),
        ({"temperature": "hot"}, "temperature='hot' is not a number"),
        ({"temperature": True}, "temperature=True is not a number"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": 2.5}, "top_k=2.5 is not an integer"),
        ({"top_k": 2.0}, "top_k=2.0 is not an integer"),
        ({"top_k": True}, "top_k=True is not an integer"),
        ({"top_k": float("nan")}, "top_k=nan is not an integer"),
        ({"top_p": float("nan")}, r"top_p=nan must lie in \(0, 1\]"),
        ({"top_p": "0.5"}, "top_p='0.5' is not a number"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)


def test_hashable():
    assert hash(Sampling(top_k=3)) == hash(Sampling(top_k=3))
    assert Sampling(top_k=3) != Sampling(top_k=4)
    same = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float64(0.5))
    assert same == Sampling(temperature=0.5, top_k=3, top_p=0.5)
    assert hash(same) == hash(Sampling(temperature=0.5, top_k=3, top_p=0.5))
