"""Merged partial attentions equal the attention over all keys."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlcache_jax.kernels.merge import merge


def attend(q, k, v):
    """Formula in float64; no keys give 0 and -inf."""
    if not len(k):
        return np.zeros(v.shape[1]), -np.inf
    logits = k @ q
    lse = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    return np.exp(logits - lse) @ v, lse


def parts_of(q, k, v, cuts):
    pieces = [attend(q, k[a:b], v[a:b]) for a, b in zip([0, *cuts], [*cuts, len(k)])]
    return [(jnp.asarray(out, jnp.float32)[None], jnp.asarray([lse], jnp.float32)) for out, lse in pieces]


@pytest.fixture
def qkv():
    rng = np.random.default_rng(0)
    return rng.normal(size=8), rng.normal(size=(30, 8)), rng.normal(size=(30, 8))


@pytest.mark.parametrize("cuts", [(), (7,), (1, 29), (4, 9, 20), (0,), (30,), (0, 10, 10, 30)])
def test_parts_of_a_split_equal_the_whole(qkv, cuts):
    wanted, wanted_lse = attend(*qkv)
    out, lse = merge(parts_of(*qkv, cuts))
    np.testing.assert_allclose(out[0], wanted, atol=1e-6)
    np.testing.assert_allclose(lse[0], wanted_lse, atol=1e-6)


def test_an_empty_part_changes_nothing(qkv):
    (part,) = parts_of(*qkv, ())
    empty = (jnp.zeros((1, 8)), jnp.full((1,), -jnp.inf))
    for parts in ([part, empty], [empty, part], [empty, empty, part]):
        out, lse = merge(parts)
        np.testing.assert_array_equal(out, part[0])
        np.testing.assert_array_equal(lse, part[1])


def test_nothing_but_empty_parts_is_an_empty_part(qkv):
    empty = (jnp.zeros((2, 8)), jnp.full((2,), -jnp.inf))
    out, lse = merge([empty, empty])
    np.testing.assert_array_equal(out, empty[0])
    np.testing.assert_array_equal(lse, empty[1])


def test_far_apart_log_sum_exps():
    out, lse = merge([(jnp.full((1, 2), 3.0), jnp.array([1e4])), (jnp.full((1, 2), 5.0), jnp.array([-1e4]))])
    np.testing.assert_array_equal(out, [[3.0, 3.0]])
    np.testing.assert_array_equal(lse, [1e4])


def test_merging_in_two_steps_equals_merging_at_once(qkv):
    a, b, c = parts_of(*qkv, (5, 21))
    for x, y in zip(merge([merge([a, b]), c]), merge([a, b, c])):
        np.testing.assert_allclose(x, y, atol=1e-6)
