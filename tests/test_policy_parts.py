"""Policies and their parts: options, rows, scores, allocation, and the checks before a prefill."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlcache_jax import Bytes, ByteShare, InputError, Mass, PolicyError, Tokens
from vlcache_jax.inference.validation import check_prefill
from vlcache_jax.inputs import Batch
from vlcache_jax.kernels.column_statistics import ColumnStatistics
from vlcache_jax.models.decoder import rope
from vlcache_jax.models.decoder.config import RopeConfig
from vlcache_jax.policies import (
    METHODS,
    AccumulatedAttention,
    AirCache,
    AllRows,
    ExpectedAttention,
    FullCache,
    LastRow,
    LastRows,
    LayerInputs,
    LookM,
    MaskVisualSinks,
    Policy,
    PostVision,
    Pyramid,
    PyramidKV,
    RandomEviction,
    RandomScore,
    RankedBits,
    RollingWindow,
    SnapKV,
    SparsityAware,
    StreamingLLM,
    Uniform,
    VLCache,
    policy_by_name,
)
from vlcache_jax.policies.shares import SlotBudget
from vlcache_jax.typing import ModelSpec

# Options


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VLCache(budget=0.0), r"budget=0.0 is out of range: give a fraction in \(0, 1\]"),
        (lambda: VLCache(budget=1.2), "budget=1.2 is out of range"),
        (lambda: VLCache(budget=10.0), "budget=10.0 is out of range.*or tokens a layer as an integer from 2 on"),
        (lambda: VLCache(budget=0.00001), "budget=1e-05 is out of range.*not below 0.0001"),
        (lambda: VLCache(budget="0.1"), "budget='0.1' is out of range"),
        (lambda: VLCache(budget=True), "budget=True is out of range"),
        (lambda: VLCache(budget=float("nan")), "budget=nan is out of range"),
        (lambda: VLCache(recent=-0.1), r"recent=-0.1 is out of range: give a fraction in \[0, 1\]"),
        (lambda: VLCache(recent=1.1), r"recent=1.1 is out of range: .*or Tokens\(n\)"),
        (lambda: VLCache(recent=Bytes(5)), r"recent=Bytes\(count=5\) is out of range"),
        (lambda: VLCache(candidate_fraction=Tokens(5)), "candidate_fraction=Tokens.*is out of range"),
        (lambda: VLCache(0, pool=3), "budget=0 is out of range"),
        (lambda: VLCache(pool=4), "pool=4: give an odd number"),
        (lambda: VLCache(pool=3, pooling="median"), "pooling='median' is not known: use 'mean' or 'max'"),
        (lambda: VLCache(pool=5, grid_side=4), "grid_side=4 is no grid for pool=5"),
        (lambda: VLCache(budget=64, total="paper"), "total='paper' is a rule for fractions.*64 tokens.*use 'exact'"),
        (lambda: VLCache(budget=Bytes(9), total="paper"), "total='paper' is a rule for fractions.*9 bytes"),
        (lambda: Policy(name="p", budget=0.1, sinks=-1), "sinks=-1 is out of range"),
        (lambda: Policy(name="p", budget=0.1, protect="images"), "protect='images' is not known: use 'text', 'vision'"),
        (lambda: StreamingLLM(budget=4), "streaming_llm: sinks=4 and a window of 1 .* do not fit into budget=4 tokens"),
        (
            lambda: SnapKV(budget=16, window=32),
            "snap_kv: sinks=0 and a window of 32 recent tokens do not fit into bu",
        ),
        (lambda: SnapKV(window=0), r"LastRows\(0\): give at least 1 row"),
        (lambda: SnapKV(heads="any"), "heads='any' is not known"),
        (lambda: PyramidKV(beta=0), "beta=0: give a whole number"),
        (lambda: AirCache(ratio=0.0), "ratio=0.0 is out of range"),
        (lambda: ExpectedAttention(future=0), "future=0 is out of range: give a whole number, at least 1"),
        (lambda: MaskVisualSinks(AccumulatedAttention(), outlier=-1), "outlier=-1 and value=0.5 must not be negative"),
        (lambda: VLCache(candidate_fraction=0), "candidate_fraction=0 is out of range"),
        (lambda: VLCache(budget=0.3, candidate_fraction=0.2), "candidate_fraction=0.2 is below budget=0.3.*raise"),
        (lambda: VLCache(threshold=0.0), r"threshold=0.0 is out of range: it must lie in \(0, 1\]"),
        (lambda: VLCache(threshold=1.5), "threshold=1.5 is out of range"),
        (lambda: VLCache(total="about"), "total='about' is not known: use 'exact', 'paper'"),
        (lambda: VLCache(heads="all"), "heads='all' is not known: use 'each' or 'shared'"),
        (lambda: VLCache(rows=LastRows(0)), r"LastRows\(0\): give at least 1 row"),
        (lambda: VLCache(rows=PostVision(fallback=0)), r"PostVision\(fallback=0\): give at least 1 row"),
        (lambda: RandomEviction(budget=2.0), "budget=2.0 is out of range"),
    ],
)
def test_options_out_of_range(build, message):
    with pytest.raises(PolicyError, match=message):
        build()


@pytest.mark.parametrize(
    "build",
    [FullCache, VLCache, RandomEviction, lambda: VLCache(0.2, rows=LastRows(50), heads="shared", total="paper")],
)
def test_equal_options_make_equal_policies(build):
    assert build() == build()
    assert hash(build()) == hash(build())
    assert build() != dataclasses.replace(build(), budget=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        build().budget = 0.5


def test_every_option_tells_policies_apart():
    options = [
        {},
        {"budget": 0.2},
        {"threshold": 0.02},
        {"recent": 0.2},
        {"rows": LastRows(50)},
        {"heads": "shared"},
        {"total": "paper"},
        {"candidate_fraction": 0.5},
    ]
    assert len({VLCache(**o) for o in options}) == len(options)
    assert len({RandomEviction(seed=seed) for seed in range(3)}) == 3


def test_whole_numbers_are_tokens_a_layer_except_for_one():
    assert VLCache(budget=2).budget == Tokens(2)
    assert VLCache(budget=256) == VLCache(budget=Tokens(256))
    assert not VLCache(budget=256).keeps_all
    assert SnapKV(budget=256, window=32).recent == Tokens(32)
    assert f"{Tokens(256):g} {Bytes(7):g}" == "256 tokens 7 bytes"  # as reports print a fraction


def test_keeps_all():
    assert FullCache().keeps_all
    assert VLCache(budget=1).keeps_all
    assert not VLCache(budget=0.9).keeps_all


# Names


def test_by_name():
    assert policy_by_name("vl_cache", budget=0.2, heads="shared") == VLCache(0.2, heads="shared")
    assert policy_by_name("full_cache") == FullCache()
    for name in METHODS:
        assert policy_by_name(name).name == name


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("vl_cache", VLCache()),
        ("look_m", LookM(0.2)),  # its authors' default
        ("vl_cache:0.2", VLCache(0.2)),
        ("vl_cache:10%", VLCache(0.1)),
        ("vl_cache:1", VLCache(1.0)),
        ("vl_cache:256", VLCache(Tokens(256))),
        ("vl_cache:64MiB", VLCache(Bytes(2**26))),
        ("vl_cache:1.5 kB", VLCache(Bytes(1500))),
        ("vl_cache:bytes:0.25,bits=4", VLCache(ByteShare(0.25), bits=4)),
        ("ranked_bits:0.25", RankedBits(ByteShare(0.25))),
        ("ranked_bits:0.1,repeat=true", RankedBits(0.1, repeat=True)),
        ("vl_cache:mass:0.98:0.4", VLCache(Mass(0.98, cap=0.4))),
        ("vl_cache:0.2,heads=shared,pool=5,threshold=1e-3", VLCache(0.2, heads="shared", pool=5, threshold=1e-3)),
        ("vl_cache, heads=shared, candidate-fraction=0.3", VLCache(heads="shared", candidate_fraction=0.3)),
        ("vl_cache,rows=last:50,mask_visual_sinks=true", VLCache(rows=LastRows(50), mask_visual_sinks=True)),
        ("look_m,merge=none,budget=64", LookM(64, merge=None)),
        ("full_cache,decoding=window:9", dataclasses.replace(FullCache(), decoding=RollingWindow(9))),
    ],
)
def test_as_typed(text, policy):
    assert policy_by_name(text) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "policy '' does not exist"),
        ("vl_cache:", "'' is not a budget: give 0.1 or 10%"),
        ("vl_cache:mass:0.98", "has no cap"),
        ("vl_cache,heads", "policy option 'heads' is not of the form name=value"),
        ("vl_cache,=1", "not of the form name=value"),
        ("vl_cache,heads=each,heads=shared", "'heads' is given twice"),
        ("vl_cache:0.1,budget=0.2", "'budget' is given twice"),
        ("vl_cache,pool=" + "9" * 12, "policy option 'pool': .* is out of range"),
    ],
)
def test_as_typed_errors(text, message):
    with pytest.raises(PolicyError, match=message):
        policy_by_name(text)


def test_an_option_in_the_text_and_beside_it():
    assert policy_by_name("vl_cache:0.2", heads="shared") == VLCache(0.2, heads="shared")
    with pytest.raises(PolicyError, match="'budget' is given twice"):
        policy_by_name("vl_cache:0.2", budget=0.3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vlcache", {}, "policy 'vlcache' does not exist: did you mean 'vl_cache'.*full_cache, vl_cache, snap_kv"),
        ("ful_cache", {}, "did you mean 'full_cache'"),
        ("zzz", {}, "policy 'zzz' does not exist: Known: full_cache"),
        ("vl_cache", {"bugdet": 0.1}, "'vl_cache' has no option 'bugdet': did you mean 'budget'.*candidate_fraction"),
        ("full_cache", {"budget": 0.1}, "'full_cache' has no option 'budget':.* Known: bits"),
        ("random", {"budget": 7.0}, "budget=7.0 is out of range"),
    ],
)
def test_by_name_errors(name, options, message):
    with pytest.raises(PolicyError, match=message):
        policy_by_name(name, **options)


# Rows


def span(rows, lengths, mask):
    first, count = rows.span(jnp.asarray(lengths, jnp.int32), jnp.asarray(mask))
    assert first.dtype == count.dtype == jnp.int32
    return list(zip(first.tolist(), count.tolist()))


@pytest.mark.parametrize(
    ("prompt", "fallback", "wanted"),
    [
        ("ttvvvttt", 32, (5, 3)),  # after the image
        ("vvtt....", 32, (2, 2)),  # padding does not count
        ("tvvtvvtt", 32, (6, 2)),  # several images: after the last
        ("tvvnvvnt", 32, (7, 1)),  # newline embeddings are visual
        ("tttttttt", 32, (0, 8)),  # text only: all of a short prompt
        ("tttttttt", 3, (5, 3)),  # text only: its last rows
        ("tttt....", 3, (1, 3)),
        ("ttvvvv..", 2, (4, 2)),  # ends in its image: its last rows
        ("vvvvvvvv", 32, (0, 8)),
        ("t.......", 32, (0, 1)),
        ("v.......", 32, (0, 1)),
    ],
)
def test_post_vision(prompt, fallback, wanted):
    length = len(prompt.rstrip("."))
    mask = [[letter in "vn" for letter in prompt]]
    assert span(PostVision(fallback), [length], mask) == [wanted]


def test_post_vision_of_a_batch():
    mask = np.zeros((3, 40), bool)
    mask[0, 5:9] = mask[2, 30:40] = True
    assert span(PostVision(), [40, 38, 40], mask) == [(9, 31), (6, 32), (8, 32)]


def test_other_rows():
    mask = np.zeros((2, 9), bool)
    assert span(LastRows(4), [9, 3], mask) == [(5, 4), (0, 3)]
    assert span(LastRow(), [9, 1], mask) == [(8, 1), (0, 1)]
    assert span(AllRows(), [9, 3], mask) == [(0, 9), (0, 3)]


# Scores


def layer_inputs(length, layer=0, sums=None, kv_heads=2):
    key = jnp.zeros((2, length, kv_heads, 4))
    statistics = None
    if sums is not None:
        statistics = ColumnStatistics(*(jnp.asarray(sums) for _ in ColumnStatistics._fields))
    return LayerInputs(
        query=key,
        key=key,
        value=key,
        lengths=jnp.full(2, length),
        vision_index=jnp.full((2, length), -1),
        layer=jnp.int32(layer),
        density=jnp.ones(2),
        rows=jnp.full(2, length),
        statistics=statistics,
    )


def test_accumulated_attention():
    sums = np.random.default_rng(0).random((2, 6, 5), np.float32)
    inputs = layer_inputs(5, sums=sums)
    each, shared = AccumulatedAttention()(inputs), AccumulatedAttention("shared")(inputs)
    np.testing.assert_allclose(each[:, 0], sums[:, :3].mean(1), rtol=1e-6)  # query heads 0, 1, 2 share KV head 0
    np.testing.assert_allclose(each[:, 1], sums[:, 3:].mean(1), rtol=1e-6)
    assert shared.shape == (2, 1, 5)
    np.testing.assert_allclose(shared[:, 0], sums.mean(1), rtol=1e-6)


def test_keys_are_turned_back_by_their_own_positions():
    """On three axes, as those of images in Qwen-VLs; text goes on behind the largest of them."""
    config = RopeConfig(sections=(1, 1, 2))
    rng = np.random.default_rng(0)
    positions, plain = rng.integers(0, 9, (2, 3, 6)).astype(np.int32), rng.normal(size=(2, 6, 2, 8)).astype(np.float32)

    def rotate(x, positions):
        return rope.rotate(x, *rope.rotation(positions, config, 8, 64))

    key = rotate(jnp.asarray(plain), jnp.asarray(positions))
    given = {"key": key, "lengths": jnp.array([4, 6]), "rotate": rotate, "positions": jnp.asarray(positions)}
    inputs = dataclasses.replace(layer_inputs(6), **given)
    np.testing.assert_allclose(inputs.unrotated(key), plain, atol=1e-5)
    assert inputs.next_positions.tolist() == [positions[0, :, :4].max() + 1, positions[1].max() + 1]
    assert dataclasses.replace(inputs, positions=None).next_positions.tolist() == [4, 6]


def test_random_scores_do_not_depend_on_the_padding():
    score = jax.jit(lambda length, layer: RandomScore(3)(layer_inputs(length, layer)), static_argnums=0)
    short, long = score(7, 1), score(20, 1)
    assert short.shape == (2, 2, 7)
    np.testing.assert_array_equal(short, long[..., :7])
    np.testing.assert_array_equal(long[0], long[1])  # every row of a batch draws alike
    assert not np.array_equal(long[:, 0], long[:, 1])  # KV heads do not
    assert not np.array_equal(long, score(20, 2))  # nor do layers
    assert not np.array_equal(RandomScore(4)(layer_inputs(7, 1)), short)  # nor seeds
    assert 0.2 < float(jnp.mean(long[0])) < 0.8
    assert not RandomScore().needs_attention
    assert AccumulatedAttention().needs_attention


# Allocation


def test_uniform():
    density = jnp.ones((3, 4))
    slots = Uniform().slots(density, jnp.array([100, 10, 1]), SlotBudget(4, 0.29))
    assert slots.tolist() == [[29, 29, 29, 29], [3, 3, 3, 2], [1, 1, 1, 1]]  # floor(4 * 10 * 0.29) = 11
    assert Uniform().threshold is None
    assert Uniform().capacity(100, SlotBudget(4, 0.29)) == 116


@pytest.mark.parametrize("allocate", [Uniform(), SparsityAware(), SparsityAware(total="paper"), Pyramid()])
@pytest.mark.parametrize("budget", [0.05, 0.5, 1.0])
def test_no_prompt_needs_more_than_the_capacity(allocate, budget):
    layers, lengths = 5, np.array([1, 2, 19, 99, 100], np.int32)
    budget = SlotBudget(layers, budget)
    density = np.exp(np.random.default_rng(0).normal(0, 2, (5, layers))).astype(np.float32)
    slots = jax.jit(lambda d, n: allocate.slots(d, n, budget))(density, lengths)
    assert slots.shape == (5, layers)
    assert np.all(slots >= 1)
    assert np.all(slots <= lengths[:, None])
    assert np.all(np.sum(slots, axis=1) <= allocate.capacity(100, budget))


# Checks before a prefill

SPEC = ModelSpec(num_layers=2, num_kv_heads=1, head_dim=4, max_positions=20, dtype=jnp.float32)


def batch(rows=2, length=10, lengths=(10, 4), **changes):
    arrays = {
        "tokens": np.zeros((rows, length), np.int32),
        "lengths": np.array(lengths, np.int32),
        "vision_index": np.full((rows, length), -1, np.int32),
        "pixels": np.zeros((rows, 0, 4, 4, 3), np.float32),
    }
    return Batch(**(arrays | changes))


def test_a_fitting_prefill_passes():
    check_prefill(SPEC, batch(), FullCache(), 10)
    check_prefill(SPEC, batch(), FullCache(), np.int64(10))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((batch(), "vl_cache", 4), PolicyError, r"policy='vl_cache' is not a policy.*VLCache\(budget=0.1\)"),
        ((batch(), FullCache, 4), PolicyError, "is not a policy"),
        ((batch(), FullCache(), 0), InputError, "max_new_tokens=0 leaves no room.*at least 1"),
        ((batch(), FullCache(), 4.0), InputError, "max_new_tokens=4.0 is not an integer"),
        ((batch(), FullCache(), True), InputError, "max_new_tokens=True is not an integer"),
        ((batch(lengths=(10,)), FullCache(), 4), InputError, r"disagree.*lengths': \(1,\)"),
        ((batch(vision_index=np.zeros((2, 9))), FullCache(), 4), InputError, r"disagree.*vision_index': \(2, 9\)"),
        ((batch(lengths=(10, 0)), FullCache(), 4), InputError, r"lengths \[10, 0\] must lie between 1 and .* 10"),
        ((batch(lengths=(11, 4)), FullCache(), 4), InputError, r"lengths \[11, 4\] must lie"),
        ((batch(), FullCache(), 11), InputError, "row 0 needs 21 positions .10 prompt.*has 20: shorten"),
    ],
)
def test_a_prefill_that_cannot_work(arguments, error, message):
    with pytest.raises(error, match=message):
        check_prefill(SPEC, *arguments)


def test_lengths_are_not_checked_while_tracing():
    def traced(lengths):
        check_prefill(SPEC, batch(lengths=(1, 1)).__class__(**fields(lengths)), FullCache(), 11)
        return lengths

    def fields(lengths):
        other = batch()
        return {"tokens": other.tokens, "lengths": lengths, "vision_index": other.vision_index, "pixels": other.pixels}

    assert jax.eval_shape(traced, jnp.array([10, 4])).shape == (2,)


def test_a_policy_needs_a_name_and_a_budget():
    with pytest.raises(TypeError):
        Policy(name="mine")
    assert Policy(name="mine", budget=0.5).allocate == Uniform()
