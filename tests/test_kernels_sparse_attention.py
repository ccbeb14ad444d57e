"""Attention with listed blocks of keys, against the formula in float64, for every implementation."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tiers import later

from vlcache_jax.kernels.attention import attention
from vlcache_jax.kernels.sparse_attention import Lists, Order, sparse_attention

RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
PLAIN = ["xla", "xla_wide", "reference"]
# (batch, length, heads, kv_heads, head_dim, list heads, rows, columns, capacity, loose columns)
CASES = {
    "groups": (2, 70, 4, 2, 8, 2, 16, 8, 5, 0),
    "heads": (1, 50, 4, 2, 8, 4, 8, 16, 3, 6),
    "loose": (2, 43, 2, 1, 4, 1, 8, 8, 6, 9),
}
TPU = (1, 520, 4, 2, 64, 2, 128, 128, 4, 0)


def drawn(case, seed=0):
    """Random queries, keys, values and lists; the last block of the first row has no list."""
    batch, length, heads, kv_heads, head_dim, list_heads, rows, columns, capacity, loose = case
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(batch, length, h, head_dim)).astype(np.float32) for h in (heads, kv_heads, kv_heads)]
    blocks, keys = -(-length // rows), -(-length // columns)
    ids = rng.integers(0, keys, (batch, list_heads, blocks, capacity)).astype(np.int32)
    counts = np.zeros(ids.shape[:3], np.int32)
    for b, h, i in np.ndindex(*counts.shape):
        reach = min(keys, -(-(i + 1) * rows // columns))
        counts[b, h, i] = rng.integers(1, min(capacity, reach) + 1)
        ids[b, h, i, : counts[b, h, i]] = np.sort(rng.permutation(reach)[: counts[b, h, i]])
    counts[0, 0, -1] = 0
    single = np.full((batch, list_heads, loose), length, np.int32)
    for b, h in np.ndindex(batch, list_heads if loose else 0):
        count = rng.integers(1, loose + 1)
        single[b, h, :count] = np.sort(rng.permutation(length)[:count])
    return *arrays, Lists(ids, counts, single if loose else None, rows, columns)


def expected(query, key, value, lists, window=None):
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, t, h in np.ndindex(*q.shape[:3]):
        of_list, of_key, i = (h * n // q.shape[2] for n in (lists.ids.shape[1], k.shape[2])), None, t // lists.rows
        of_list, of_key = of_list
        count = lists.counts[b, of_list, i]
        listed = set(lists.ids[b, of_list, i, :count].tolist())
        single = set() if lists.loose is None or not count else set(lists.loose[b, of_list].tolist())
        seen = range(t + 1)
        if lists.order is not None:
            places, limits = np.asarray(lists.order.places), np.asarray(lists.order.limits)
            seen = [j for j in range(k.shape[1]) if places[b, of_list, j] < limits[b, of_list, t]]
        seen = [j for j in seen if j // lists.columns in listed or j in single]
        seen = [j for j in seen if window is None or j > t - window]
        if seen:
            logits = k[b, seen, of_key] @ q[b, t, h] * q.shape[3] ** -0.5
            lse[b, t, h] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
            out[b, t, h] = np.exp(logits - lse[b, t, h]) @ v[b, seen, of_key]
    return out, lse


def moved(lists, length, seed=1):
    """The same lists of tokens in another order, which see what lies 5 or more before them."""
    rng = np.random.default_rng(seed)
    places = np.argsort(rng.random((*lists.ids.shape[:2], length)), axis=-1).astype(np.int32)
    return dataclasses.replace(lists, order=Order(places, np.maximum(places - 4, 0)), loose=None)


@functools.cache
def compiled(implementation, window=None):
    return jax.jit(lambda *args: sparse_attention(*args, window=window, implementation=implementation))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", PLAIN)
def test_formula(implementation, name, window):
    args = drawn(CASES[name])
    for found, wanted in zip(compiled(implementation, window)(*args), expected(*args, window)):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["groups", *later("heads")])
@pytest.mark.parametrize("implementation", PLAIN)
def test_an_order_of_tokens(implementation, name):
    query, key, value, lists = drawn(CASES[name])
    args = query, key, value, moved(lists, CASES[name][1])
    for found, wanted in zip(compiled(implementation)(*args), expected(*args)):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("interpret", [True, *later(RACES)])
def test_tpu_kernel_with_an_order(interpret):
    query, key, value, lists = drawn((1, 300, 2, 1, 64, 1, 128, 128, 3, 0))
    args = query, key, value, moved(lists, 300)
    wanted = sparse_attention(*args, implementation="reference")
    found = sparse_attention(*args, implementation="pallas_tpu", interpret=interpret)
    for some, right in zip(found, wanted):
        np.testing.assert_allclose(some, right, atol=1e-5)


@pytest.mark.parametrize("interpret", [True, *later(RACES)])
@pytest.mark.parametrize("window", [None, *later(200)])
def test_tpu_kernel(window, interpret):
    """Blocks that no list names are NaN, as uninitialised memory is in the slow interpreter."""
    query, key, value, lists = drawn(TPU)
    named = {(h, i) for _, h, r, c in np.ndindex(*lists.ids.shape) if c < lists.counts[0, h, r]
             for i in [lists.ids[0, h, r, c]]}  # fmt: skip
    hidden = [(h, i) for h in range(2) for i in range(5) if (h, i) not in named]
    assert hidden
    wanted = sparse_attention(query, key, value, lists, window=window, implementation="reference")
    for h, i in hidden:
        for x in (key, value):
            x[:, i * 128 : (i + 1) * 128, h] = np.nan
    run = functools.partial(sparse_attention, window=window, implementation="pallas_tpu", interpret=interpret)
    for found, right in zip(run(query, key, value, lists), wanted):
        np.testing.assert_allclose(found, right, atol=1e-5)


@pytest.mark.parametrize("name", ["groups", "heads"])
@pytest.mark.parametrize("implementation", PLAIN)
def test_what_no_list_names_may_be_nan(implementation, name):
    query, key, value, lists = drawn(CASES[name])
    rows, heads = np.arange(lists.ids.shape[0])[:, None, None, None], np.arange(lists.ids.shape[1])[None, :, None, None]
    there = np.arange(lists.ids.shape[3]) < lists.counts[..., None]
    named = np.zeros((len(key), key.shape[2], 20), bool)
    sharing = lists.ids.shape[1] // key.shape[2]
    np.logical_or.at(named, (rows, heads // sharing, np.where(there, lists.ids, 19)), True)
    single = np.zeros(key.shape[:3], bool)
    for b, h in np.ndindex(*lists.ids.shape[:2]):
        for j in [] if lists.loose is None else lists.loose[b, h]:
            single[b, j : j + 1, h // sharing] = True
    of_key = named[:, :, np.arange(key.shape[1]) // lists.columns].swapaxes(1, 2) | single
    assert not of_key.all()
    found = compiled(implementation)(query, *(np.where(of_key[..., None], x, np.nan) for x in (key, value)), lists)
    for x, y in zip(found, compiled(implementation)(query, key, value, lists)):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("implementation", PLAIN)
def test_everything_is_dense_attention(implementation):
    query, key, value, _ = drawn(CASES["groups"])
    ids = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 2, 9, 9))
    counts = np.broadcast_to(np.arange(1, 10, dtype=np.int32), (2, 2, 9))
    out, lse = compiled(implementation)(query, key, value, Lists(ids, counts, rows=8, columns=8))
    dense = attention(query, key, value, implementation="reference")
    np.testing.assert_allclose(out, dense[0], atol=2e-6)
    np.testing.assert_allclose(lse, dense[1], atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "xla_wide"])
def test_a_row_of_a_batch_equals_the_row_alone(implementation):
    *arrays, lists = drawn(CASES["loose"])
    whole = compiled(implementation)(*arrays, lists)
    for b in range(2):
        alone = compiled(implementation)(*jax.tree.map(lambda x: x[b : b + 1], (*arrays, lists)))  # noqa: B023
        for x, y in zip(alone, whole):
            np.testing.assert_allclose(x[0], y[b], atol=1e-6)


def test_bfloat16():
    query, key, value, lists = drawn(CASES["groups"])
    low = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    out, _ = compiled("xla")(*low, lists)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected(*map(jnp.float32, low), lists)[0], atol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((2, 3, 5, 5), np.int32)}, r"lists (2, 3, 5, 5) must be [2, 2 or 4, 5, capacity]"),
        ({"counts": np.zeros((2, 2, 4), np.int32)}, "counts (2, 2, 4)"),
        ({"loose": np.zeros((2, 1, 4), np.int32)}, "loose (2, 1, 4)"),
        ({"rows": 8}, "8 queries a block"),
        ({"order": Order(np.zeros((2, 2, 70)), np.zeros((2, 2, 69)))}, "limits (2, 2, 69) must be (2, 2, 70)"),
        ({"order": Order(0, 0), "loose": np.zeros((2, 2, 4), np.int32)}, "neither loose columns nor a window"),
    ],
)
def test_errors(change, message):
    *arrays, lists = drawn(CASES["groups"])
    fields = {"ids": lists.ids, "counts": lists.counts, "loose": None, "rows": 16, "columns": 8} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        sparse_attention(*arrays, Lists(**fields))


def test_blocks_that_the_tpu_kernel_does_not_serve():
    with pytest.raises(NotImplementedError, match="multiple of 128 queries and keys, not 16 and 8"):
        sparse_attention(*drawn(CASES["groups"]), implementation="pallas_tpu", interpret=True)
