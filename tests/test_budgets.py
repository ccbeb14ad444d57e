"""Layer budgets against an exact solution in fractions."""

import bisect
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_jax.cache.geometry import capacity
from vlcache_jax.errors import PolicyError
from vlcache_jax.policies import SparsityAware
from vlcache_jax.policies.budget import Bytes, Tokens
from vlcache_jax.policies.shares import SlotBudget, layer_budgets, share_slots, slot_budget, total_slots
from vlcache_jax.typing import ModelSpec

quick = settings(max_examples=25, deadline=None, derandomize=True)
LAYERS = [2, 5, 32]
BUDGETS = ["0.01", "0.29", "0.9", "1.0"]


@functools.cache
def compiled(budget, total="exact"):
    return jax.jit(lambda density, length: layer_budgets(density, length, budget, total))


def bounds(layers, length, budget):
    total = max(layers, int(Fraction(budget) * layers * length))
    return min(max(1, length // 100), total // layers), length, total


def exact_shares(density, lower, upper, total):
    """Fractions x with x = clip(c * density, lower, upper) and sum(x) = total."""
    weights = [Fraction(float(d)) for d in density]

    def shares(c):
        return [min(max(c * w, Fraction(lower)), Fraction(upper)) for w in weights]

    # The sum is a polygon in c that never falls; find its first corner at or above the total.
    corners = sorted({Fraction(0), *(Fraction(bound) / w for w in weights for bound in (lower, upper))})
    right = bisect.bisect_left(corners, total, key=lambda c: sum(shares(c)))
    if right == 0:
        return shares(corners[0])
    low, high = (sum(shares(c)) for c in corners[right - 1 : right + 1])
    return shares(corners[right - 1] + (corners[right] - corners[right - 1]) * (total - low) / (high - low))


def expected(density, length, budget):
    """(slots, exact shares) by A.2: round down, then the largest fractional parts, ties to the lower layer."""
    lower, upper, total = bounds(len(density), length, budget)
    shares = exact_shares(density, lower, upper, total)
    slots = [int(x) for x in shares]
    order = sorted(range(len(slots)), key=lambda l: (-(shares[l] - slots[l]), l))
    for layer in order[: total - sum(slots)]:
        slots[layer] += 1
    return np.array(slots), shares


def check(slots, density, length, budget):
    """Equal to the exact solution, except where float32 cannot tell two fractional parts apart."""
    wanted, shares = expected(density, length, budget)
    assert slots.sum() == wanted.sum()
    different = np.flatnonzero(slots != wanted)
    assert np.abs(slots - wanted).max() <= 1
    parts = [float(shares[l] % 1) for l in different]
    around = [min(abs(a - b), 1 - abs(a - b)) for a in parts for b in parts]
    assert max(around, default=0) < 1e-5 * length


@st.composite
def densities(draw):
    layers = draw(st.sampled_from(LAYERS))
    kind = draw(st.sampled_from(["any", "ties", "spread", "two levels"]))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    density = {
        "any": rng.uniform(0.01, 0.3, layers),
        "ties": rng.integers(1, 4, layers) / 8,
        "spread": np.exp(rng.normal(0, 3, layers)),
        "two levels": rng.choice([0.001, 1.0], layers),
    }[kind]
    return density.astype(np.float32)


lengths = st.sampled_from([1, 2, 3, 99, 100, 101, 777]) | st.integers(1, 3000)


@quick
@given(density=densities(), length=lengths, budget=st.sampled_from(BUDGETS))
def test_exact_total(density, length, budget):
    slots = np.asarray(compiled(float(budget))(density, length))
    lower, upper, total = bounds(len(density), length, budget)
    assert slots.dtype == np.int32
    assert slots.sum() == total
    assert slots.min() >= lower
    assert slots.max() <= upper
    check(slots, density, length, budget)
    for a in range(len(density)):  # monotone: a denser layer never gets less
        assert all(slots[a] >= slots[b] for b in range(len(density)) if density[a] > density[b] * (1 + 1e-5))


@quick
@given(density=densities(), length=lengths, seed=st.integers(0, 100))
def test_permuted_layers_get_permuted_slots(density, length, seed):
    # Multiples of 1/1024 of the shape of `density`, all different, so that there are no ties but those of rounding.
    density = (1 + np.argsort(np.argsort(density, kind="stable"))).astype(np.float32) / 64
    order = np.random.default_rng(seed).permutation(len(density))
    run = compiled(0.29)
    np.testing.assert_allclose(run(density[order], length), np.asarray(run(density, length))[order], atol=1)
    assert (np.sort(run(density[order], length)) == np.sort(run(density, length))).mean() > 0.9


@pytest.mark.parametrize(
    ("density", "length", "budget", "wanted"),
    [
        ([3, 1], 100, 0.2, [30, 10]),
        ([1, 1, 1, 1], 11, 0.5, [6, 6, 5, 5]),  # 22 slots: ties to the lower layer
        ([1, 1, 1], 1000, 0.001, [1, 1, 1]),  # the lower bounds of 10 exceed the total of 3
        ([1000, 1, 1], 1000, 0.01, [10, 10, 10]),  # they equal it
        ([1000, 1, 1], 1000, 0.1, [280, 10, 10]),  # held at 1 %
        ([1000, 1, 1], 100, 0.5, [100, 25, 25]),  # held at the prompt's length, the rest shared again
        ([1000, 3, 1], 100, 0.5, [100, 38, 12]),  # 37.5 and 12.5: the tie goes to the lower layer
        ([0, 0, 1], 100, 0.2, [1, 1, 58]),  # no density
        ([0, 0], 100, 0.2, [20, 20]),
        ([float("nan"), 1], 100, 0.2, [1, 39]),  # ranks like no density
        ([5, 1, 1], 1, 0.1, [1, 1, 1]),
        ([7], 50, 0.3, [15]),
        ([1, 1000, 1], 7, 1.0, [7, 7, 7]),
        ([1, 1000, 1], 100, 0.29, [1, 85, 1]),
    ],
)
def test_examples(density, length, budget, wanted):
    assert layer_budgets(jnp.array(density, jnp.float32), length, budget).tolist() == wanted


@pytest.mark.parametrize("length", [1, 13, 131_072])
def test_budget_one_keeps_everything(length):
    density = np.exp(np.random.default_rng(0).normal(0, 3, 32)).astype(np.float32)
    for total in ("exact", "paper"):
        slots = compiled(1.0, total)(density if total == "exact" else np.ones(32, np.float32), length)
        assert slots.tolist() == [length] * 32


@quick
@given(density=densities(), length=lengths, budget=st.sampled_from(BUDGETS))
def test_paper_total(density, length, budget):
    slots = np.asarray(compiled(float(budget), "paper")(density, length))
    share = density.astype(np.float64) / density.astype(np.float64).sum() * float(budget) * len(density)
    wanted = np.clip(share, 0.01, 1) * length
    assert slots.min() >= 1
    assert slots.max() <= length
    # The integer part, but for products within float32 of an integer.
    assert np.all(slots >= np.maximum(1, np.floor(wanted - 1e-6 * length)))
    assert np.all(slots <= np.maximum(1, np.floor(wanted + 1e-6 * length)))
    assert slots.sum() <= SparsityAware(total="paper").capacity(length, SlotBudget(len(density), float(budget)))


@pytest.mark.parametrize("length", [131_072, 1_048_576])
@pytest.mark.parametrize("budget", ["0.1", "0.77", "0.99"])
def test_float32_does_not_break_large_totals(length, budget):
    # At 80 layers of a million tokens a total has 27 bits and float32 has 24: some shares round up past the total.
    layers, rows = 80, 100
    rng = np.random.default_rng(0)
    density = np.concatenate(
        [
            rng.uniform(0.01, 1, (rows, layers)),
            np.exp(rng.normal(0, 2, (rows, layers))),
            rng.integers(1, 4, (rows, layers)) / 7,
            np.ones((1, layers)) / 3,
        ]
    ).astype(np.float32)
    slots = np.asarray(jax.jit(jax.vmap(lambda d: layer_budgets(d, length, float(budget))))(density))
    lower, upper, total = bounds(layers, length, budget)
    assert set(slots.sum(1).tolist()) == {total}
    assert slots.min() >= lower
    assert slots.max() <= upper
    for row in (0, rows, 2 * rows):
        shares = exact_shares(density[row], lower, upper, total)
        assert np.abs(slots[row] - np.array([float(x) for x in shares])).max() < max(1.01, 1e-5 * length)


def test_eager_compiled_and_batched_agree():
    rng = np.random.default_rng(1)
    density = np.exp(rng.normal(0, 2, (8, 32))).astype(np.float32)
    lengths = rng.integers(1, 3000, 8).astype(np.int32)
    batched = jax.jit(lambda d, n: SparsityAware().slots(d, n, SlotBudget(32, 0.29)))(density, lengths)
    for row in range(8):
        alone = compiled(0.29)(density[row], lengths[row])
        np.testing.assert_array_equal(batched[row], alone)
    np.testing.assert_array_equal(layer_budgets(jnp.asarray(density[0]), lengths[0], 0.29), batched[0])


def test_total_slots():
    assert total_slots(4, 100, 0.29) == 116
    assert total_slots(4, 3, 0.1) == 4
    assert isinstance(total_slots(4, 100, 0.29), int)
    assert total_slots(4, jnp.array([100, 3]), 0.29).tolist() == [116, 4]


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, float("nan")])
def test_budget_out_of_range(budget):
    with pytest.raises(PolicyError, match=r"budget .* out of range"):
        layer_budgets(jnp.ones(2), 10, budget)


def test_unknown_total():
    with pytest.raises(PolicyError, match=r"total='about'.*'exact' or 'paper'"):
        layer_budgets(jnp.ones(2), 10, 0.5, "about")


# Budgets in other units

SPEC = ModelSpec(num_layers=4, num_kv_heads=2, head_dim=8, max_positions=1000, dtype=jnp.bfloat16)
SLOT = 2 * (2 * 8 * 2 + 4)  # bytes of a slot in all KV heads: key and value in bfloat16, position


def test_tokens_are_an_average_over_layers_and_never_more_than_the_prompt():
    budget = slot_budget(Tokens(10), SPEC)
    assert budget.total(100) == 40
    assert budget.total(7) == 28
    assert budget.total(jnp.array([100, 7])).tolist() == [40, 28]
    assert slot_budget(0.29, SPEC).total(100) == 116


@pytest.mark.parametrize("pool", [64, 80, 1000, 4096, 4200])
def test_bytes_are_what_the_buffers_of_one_prompt_take(pool):
    offsets_and_lengths = 2 * 4 * 4
    budget = slot_budget(Bytes(pool * SLOT + offsets_and_lengths), SPEC)
    room = capacity(budget.total(10**6), layers=4)
    assert pool - (128 if pool > 2048 else 16) < room <= pool  # whole tiles
    assert budget.total(3) == min(12, budget.slots)
    least = 64 * SLOT + offsets_and_lengths
    with pytest.raises(PolicyError, match=f"cannot hold one token for each of the 4 layers: give at least {least}"):
        slot_budget(Bytes(64 * SLOT + offsets_and_lengths - 1), SPEC)


@pytest.mark.parametrize("build", [lambda: Tokens(-1), lambda: Tokens(1.5), lambda: Tokens(True), lambda: Bytes(0)])
def test_amounts_that_are_no_amounts(build):
    with pytest.raises(PolicyError, match="give a whole number"):
        build()


@quick
@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.1, 1, 5]))
def test_shared_slots_add_up_within_their_bounds(seed, spread):
    rng = np.random.default_rng(seed)
    weight = np.exp(rng.normal(0, spread, 5)).astype(np.float32)
    upper, lower = int(rng.integers(1, 50)), int(rng.integers(0, 4))
    slots = int(rng.integers(0, 5 * upper + 1))
    found = np.asarray(shared(weight, slots, lower, upper))
    assert found.sum() == slots
    assert found.max() <= upper
    assert found.min() >= min(lower, slots // 5, upper)


@jax.jit
def shared(weight, slots, lower, upper):
    return share_slots(weight, slots, lower, upper)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_do_not_make_it_endless(bad):
    assert int(shared(np.array([1, bad, 2], np.float32), 10, 1, 10).sum()) == 10


def test_a_budget_beyond_int32_keeps_everything():
    for budget in (SlotBudget(layers=4, per_layer=2**31 - 1), SlotBudget(layers=4, slots=2**62)):
        assert int(budget.total(jnp.int32(7))) == budget.total(7) == 28
