"""Merging of evicted tokens: its values against the formula in plain numpy, and the promises it must keep."""

import dataclasses

import jax
import jax.numpy as jnp
import method_references as reference
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from stub_model import HEADS, KV_HEADS, LAYERS, StubModel, kept_sets, stub_batch, stub_params
from test_methods_promises import prefill, row_alone, told

import vlcache_jax as vlc
from vlcache_jax.cache.merging import BLOCK, merge_evicted
from vlcache_jax.policies import AccumulatedAttention, LayerInputs, TextPrior

KINDS = ("averaged", "pivotal", "weighted")


def policy_with(kind, policy=None):
    return dataclasses.replace(policy or vlc.VLCache(0.3), evicted=vlc.Merge(kind))


def stored(state):
    """(keys, values) [layer][row][head] of the kept tokens, in ascending position."""
    c = state.context
    positions, offsets, lengths = (np.asarray(x) for x in (c.positions, c.offsets, c.lengths))

    def one(x, layer, row, head):
        start = offsets[row, layer, 0]
        return np.asarray(x[row, head, start : start + lengths[row, layer, 0]], np.float64)

    cells = [(i, row, h) for i in range(offsets.shape[1]) for row in range(len(positions)) for h in range(KV_HEADS)]
    return {cell: (one(c.keys, *cell), one(c.values, *cell)) for cell in cells}


def check(state, batch, params, kind, tolerance):
    merged, found, kept = 0, stored(state), kept_sets(state)
    for (layer, row, head), (keys, values) in found.items():
        n = int(batch.lengths[row])
        key, value = (np.asarray(params[x][layer, row, :n, head], np.float64) for x in ("key", "value"))
        own = kept[layer][row][head]
        wanted = reference.merge(key, value, own, kind)
        np.testing.assert_allclose(keys, wanted[0], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(values, wanted[1], rtol=tolerance, atol=tolerance)
        merged += np.sum(np.abs(wanted[0] - key[own]).max(axis=1) > 0.01)
    return merged


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        (vlc.VLCache(0.3), "pivotal"),
        (vlc.VLCache(0.3), "averaged"),
        (vlc.TOVA(0.2), "weighted"),
        (vlc.LookM(0.35, selection="code"), "weighted"),
    ],
    ids=["vl_cache", "vl_cache_averaged", "tova_weighted", "look_m_weighted"],
)
def test_merged_values_equal_the_definition(policy, kind):
    policy = policy_with(kind, policy)
    for seed in range(3):  # of the same shape: one compilation
        batch = stub_batch(seed=seed)
        params = stub_params(batch, seed)
        state = prefill(policy, batch, params)
        assert check(state, batch, params, kind, 1e-5) > 20, "hardly anything was merged"


def test_merging_does_not_change_what_is_kept():
    batch = stub_batch()
    params = stub_params(batch)
    merged, dropped = (prefill(p, batch, params) for p in (policy_with("pivotal"), vlc.VLCache(0.3)))
    assert kept_sets(merged) == kept_sets(dropped)
    for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(dropped)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_bfloat16_is_rounded_once():
    batch = stub_batch()
    params = stub_params(batch, dtype=jnp.bfloat16)
    _, state = vlc.prefill(StubModel("bfloat16"), params, batch, policy_with("pivotal")).start(4)
    assert state.context.keys.dtype == jnp.bfloat16
    check(state, batch, params, "pivotal", 2**-8)  # half a step of 8 bits, and float32's own error


def compiled(kind):
    return jax.jit(lambda keys, values, order, lengths: merge_evicted(keys, values, order, lengths, kind))


COMPILED = {kind: compiled(kind) for kind in KINDS}


def _nearly_tied(keys, own):
    """Whether a token is as like to two kept ones as float32 can tell, but not equally."""
    unit = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-30)
    best = np.sort(np.delete(unit, own, axis=0) @ unit[own].T, axis=1)[:, -2:]
    gap = np.diff(best, axis=1)
    return bool(np.any((gap > 1e-12) & (gap < 1e-6)))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(KINDS),
    shared=st.booleans(),
    copies=st.booleans(),
    counts=st.lists(st.integers(1, 300), min_size=4, max_size=4),
)
def test_any_kept_set(seed, kind, shared, copies, counts):
    """Over several blocks of kept tokens; with keys of zeros and, against ties, keys that are there more than once."""
    layers, batch, heads, tokens, d = 2, 2, 3, 300, 5
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(2, layers, batch, heads, tokens, d)).astype(np.float32)
    if copies:  # of few directions, with small whole numbers: equal cosines are exactly equal
        keys = rng.choice([[3, 4, 0, 0, 0], [0, 0, 5, 12, 0], [0, 0, 0, 0, 1]], keys.shape[:-1]).astype(np.float32)
    keys[..., 7, :] = 0
    lengths = np.array([tokens, rng.integers(3, tokens)], np.int32)
    for row, n in enumerate(lengths):
        keys[:, row, :, n:] = values[:, row, :, n:] = np.nan
    order = np.full((layers, batch, 1 if shared else heads, tokens), tokens, np.int32)
    for cell, count in zip(np.ndindex(layers, batch), counts):
        for head in range(order.shape[2]):
            n = int(lengths[cell[1]])
            own = np.sort(rng.permutation(n)[:count])
            order[(*cell, head, slice(len(own)))] = own
    found = COMPILED[kind](keys, values, order, np.tile(lengths, (len(keys), 1)))
    for cell in np.ndindex(layers, batch, heads):
        own = order[(*cell[:2], min(cell[2], order.shape[2] - 1))]
        own = own[own < tokens]
        n = lengths[cell[1]]
        assume(not _nearly_tied(keys[cell][:n].astype(float), own))  # where rounding decides
        wanted = reference.merge(keys[cell][:n].astype(float), values[cell][:n].astype(float), own, kind)
        for x, y in zip(found, wanted):
            np.testing.assert_allclose(x[cell][: len(own)], y, rtol=1e-5, atol=1e-5)


def test_what_nothing_went_to_stays_as_it_is():
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 1, 1, 2, 2 * BLOCK + 3, 4)).astype(np.float32)
    keys[0, 0, 0, 5] = -0.0
    order = np.broadcast_to(np.arange(keys.shape[3]), keys.shape[:4])
    found = COMPILED["pivotal"](keys, values, order, np.array([[keys.shape[3]]]))
    for x, y in zip(found, (keys, values)):
        assert np.asarray(x).tobytes() == y.tobytes()


# With the emitters that conftest.py chooses before JAX 0.11, programs of different batches differ in the last bit.
AS_USERS_COMPILE = jax.__version_info__ >= (0, 11)


def test_a_row_merges_alike_in_any_batch_and_padding():
    policy = policy_with("pivotal")
    batch = stub_batch()
    params = stub_params(batch)
    together = prefill(policy, batch, params)
    whole = stored(together)
    for row in range(batch.size):
        for length in (batch.length, batch.length + 13):  # the padding holds NaN
            alone = prefill(policy, *row_alone(batch, params, row, length))
            for (layer, _, head), own in stored(alone).items():
                for x, y in zip(own, whole[layer, row, head]):
                    if length == batch.length and AS_USERS_COMPILE:
                        np.testing.assert_array_equal(x, y)
                    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def test_budget_one_merges_nothing_bit_for_bit():
    batch = stub_batch()
    params = stub_params(batch)
    one, full = (prefill(p, batch, params) for p in (vlc.LookM(1.0), vlc.FullCache()))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), one, full))
    short = prefill(policy_with("pivotal", vlc.TOVA(64)), batch, params)  # tokens: all of these prompts
    check(short, batch, params, "pivotal", 0)


@pytest.mark.parametrize("name", ["key", "value"])
def test_a_broken_checkpoint_is_an_error(name):
    policy = policy_with("averaged", vlc.StreamingLLM(0.4))  # which looks at neither
    batch = stub_batch()
    params = stub_params(batch)
    params[name][1, 2, 0] = np.nan
    with pytest.raises(vlc.CheckpointError, match="layer 1 has scores, keys or values that are not finite for row 2"):
        told(policy, batch, params)


@pytest.mark.parametrize("shape", [(8, 1), (2, 2)], ids=["data", "data_and_model"])
@pytest.mark.parametrize("shared", [True, False])
def test_on_a_mesh(shape, shared):
    layers, batch, tokens = 2, 8, 40
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, layers, batch, KV_HEADS, tokens, 8)).astype(np.float32)
    lengths = rng.integers(10, tokens, batch).astype(np.int32)
    scores = rng.normal(size=(layers, batch, 1 if shared else KV_HEADS, tokens))
    rank = np.argsort(np.argsort(np.where(np.arange(tokens) < lengths[:, None, None], -scores, 9)))
    order = np.sort(np.where(rank < 6, np.arange(tokens), tokens)).astype(np.int32)
    lengths = np.tile(lengths, (len(keys), 1))
    plain = COMPILED["weighted"](keys, values, order, lengths)
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("data", "model"), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, PartitionSpec(None, "data", "model"))
        run = jax.jit(lambda k, v, o, n: merge_evicted(k, v, o, n, "weighted"))
        lowered = run.lower(jax.device_put(keys, split), jax.device_put(values, split), order, lengths).compile()
        found = lowered(jax.device_put(keys, split), jax.device_put(values, split), order, lengths)
    text = lowered.as_text()
    assert not any(name in text for name in ("all-gather(", "all-reduce(", "all-to-all(", "collective-permute("))
    for x, y in zip(found, plain):
        assert x.sharding.is_equivalent_to(split, x.ndim)
        np.testing.assert_allclose(x[..., :6, :], y[..., :6, :], rtol=1e-6, atol=1e-6)


def test_memory_grows_with_the_length_not_its_square():
    def temporary(tokens, batch=2, layers=4):
        buffer = jax.ShapeDtypeStruct((layers, batch, KV_HEADS, tokens, 64), jnp.float32)
        order = jax.ShapeDtypeStruct((layers, batch, KV_HEADS, tokens), jnp.int32)
        lengths = jax.ShapeDtypeStruct((layers, batch), jnp.int32)
        run = jax.jit(lambda k, v, o, n: merge_evicted(k, v, o, n, "pivotal"), donate_argnums=(0, 1))
        memory = run.lower(buffer, buffer, order, lengths).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= 2 * 4 * np.prod(buffer.shape)  # written in place
        return memory.temp_size_in_bytes

    small, large = temporary(1024), temporary(4096)
    assert large < 4.2 * small
    assert large < 4 * KV_HEADS * 4096 * (4 * BLOCK + 8 * 64)  # far from [tokens, tokens]: 128 MiB
    assert temporary(1024, batch=8, layers=8) < 1.1 * small


def test_impossible_combinations_are_refused():
    with pytest.raises(vlc.PolicyError, match=r"candidate_fraction=0\.5 a layer loses tokens .* Drop\(\)"):
        vlc.LookM(0.2, candidate_fraction=0.5)
    with pytest.raises(vlc.PolicyError, match=r"Merge\('pivot'\) is not known: use averaged, pivotal, weighted"):
        vlc.LookM(merge="pivot")
    with pytest.raises(vlc.PolicyError, match="evicted='merge' is not known"):
        vlc.Policy(name="own", budget=0.2, evicted="merge")
    with pytest.raises(vlc.PolicyError, match="selection='both' is not known"):
        vlc.LookM(selection="both")


# LOOK-M's selection


@dataclasses.dataclass(frozen=True)
class Given(vlc.policies.Score):
    values: tuple

    def __call__(self, inputs):
        return jnp.asarray(self.values, jnp.float32)


def ranked(scores, visual, length):
    index = jnp.where(jnp.asarray(visual), 0, -1)[None]
    inputs = LayerInputs(
        query=jnp.zeros((1, len(visual), HEADS, 1)), key=jnp.zeros((1, len(visual), 1, 1)), value=jnp.zeros((1, 1)),
        lengths=jnp.array([length]), vision_index=index, layer=jnp.array(0), density=jnp.ones(1), rows=jnp.ones(1),
    )  # fmt: skip
    return np.asarray(TextPrior(Given(((tuple(scores),),)))(inputs))[0, 0, :length]


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=20), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_the_text_prior_ranks_as_the_formula_does(tokens, length):
    length = min(length, len(tokens))
    scores, visual = (np.array(x) for x in zip(*tokens, *[(0, False)] * (20 - len(tokens))))  # of one shape
    padded = np.where(np.arange(len(scores)) < length, scores, np.nan)
    total = (scores + scores[:length].max() * ~visual)[:length]
    wanted = np.unique(total, return_inverse=True)[1]
    np.testing.assert_array_equal(ranked(padded.tolist(), visual.tolist(), length), wanted)


def test_the_text_prior_loses_nothing_to_rounding_and_hides_nothing():
    tiny = np.finfo(np.float32).tiny
    text, visual = [tiny, 2 * tiny, 3e-30], [5e8, 4e8]
    assert ranked(text + visual, [False] * 3 + [True] * 2, 5).tolist() == [2, 3, 4, 1, 0]
    assert np.isnan(ranked([1, np.nan, np.inf], [False] * 3, 3)).tolist() == [False, True, True]


def test_paper_and_code_differ_only_in_text_that_nothing_attends_to():
    assert ranked([7.0, 0.0, 7.0, 1.0], [True, False, True, True], 4).tolist() == [1, 1, 1, 0]
    batch = stub_batch()
    params = stub_params(batch)
    paper, code = (prefill(vlc.LookM(0.35, merge=None, selection=x), batch, params) for x in ("paper", "code"))
    assert kept_sets(paper) == kept_sets(code)
    assert vlc.LookM(selection="paper").score == TextPrior(AccumulatedAttention())


assert LAYERS * KV_HEADS > 1  # or the tests above would not see a layer or head taken for another
