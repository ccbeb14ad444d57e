"""The promises that every compression method keeps; a new method joins by adding it to METHODS."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from stub_model import StubModel, kept_sets, stub_params
from tiers import later
from tiny_models import one_row, ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inference.decode_step import advance
from vlcache_jax.parallel.params import param_shardings

NEW = 8
METHODS = {
    "vl_cache": vlc.VLCache(budget=0.3),
    "vl_cache_shared": vlc.VLCache(budget=0.3, heads="shared", rows=vlc.LastRows(4)),
    "vl_cache_paper": vlc.VLCache(budget=0.3, total="paper"),
    "vl_cache_candidates": vlc.VLCache(budget=0.3, candidate_fraction=0.7),
    "vl_cache_grid": vlc.VLCache(budget=0.3, pool=3, grid_side=4, mask_visual_sinks=True),
    "vl_cache_tokens": vlc.VLCache(budget=20),
    "snap_kv": vlc.SnapKV(budget=0.3, window=4),
    "pyramid_kv": vlc.PyramidKV(budget=0.3, window=4),
    "ada_kv": vlc.AdaKV(budget=0.3, window=4),
    "snap_kv_mass": vlc.SnapKV(vlc.Mass(0.5, cap=0.4), window=4),
    "h2o": vlc.H2O(budget=0.3),
    "tova": vlc.TOVA(budget=0.3),
    "streaming_llm": vlc.StreamingLLM(budget=0.3),
    "look_m": vlc.LookM(budget=0.3),
    "look_m_code": vlc.LookM(budget=0.3, selection="code", merge=None),
    "prefix_kv": vlc.PrefixKV(budget=0.3),
    "air_cache": vlc.AirCache(budget=0.3),
    "mix_kv": vlc.MixKV(budget=0.3, window=4),
    "tgv_kv": vlc.TGVKV(budget=0.3),
    "csp": vlc.CSP(budget=0.3, window=4),
    "critical_kv": vlc.CriticalKV(budget=0.3, window=4),
    "kv_zip": vlc.KVzip(budget=0.3),
    "sparse_mm": vlc.SparseMM(budget=0.3, scores=[[1, 3], [2, 0], [0, 1]], window=4),
    "compactor": vlc.Compactor(budget=0.3, sketch=4, chunk=16, sinks=2, recent=2),
    "lag_kv": vlc.LagKV(budget=0.3, sinks=2, lag=8),
    "expected_attention": vlc.ExpectedAttention(budget=0.3, future=32),
    "key_norm": vlc.KeyNorm(budget=0.3),
    "key_difference": vlc.KeyDifference(budget=0.3),
    "zip_vl": vlc.ZipVL(budget=0.3),
    "vl_cache_8_bits": vlc.VLCache(budget=0.3, bits=8),
    "ranked_bits": vlc.RankedBits(budget=0.3),
    "ranked_bits_repeated": vlc.RankedBits(budget=0.3, repeat=True),
    "random": vlc.RandomEviction(budget=0.3),
}
RECIPE = vlc.Recipe(  # whatever takes a policy takes one
    vlc.VLCache(budget=0.3),
    prefill=vlc.XAttention(0.9, 4, block=8, min_tokens=0),
    pruning=vlc.PyramidDrop((1, 2), (0.6, 0.3), rooms=(96, 88)),
)
WITH_FULL = METHODS | {"full_cache": vlc.FullCache(), "recipe": RECIPE}

# A method differs from another only in what it keeps. So every method keeps every promise about that (here as far as
# one compilation serves, and in test_methods_promises.py); what follows from a store, whoever filled it, is tested for
# those that bring a part of their own: sinks, a protected kind, candidates, shared heads, a budget in tokens. FEW is
# for promises whose every case is a large compilation; of those, all but the first are thorough where the promise is
# about what lies around the methods.
# Of no new kind here: thorough.
NEWER = ("tgv_kv", "csp", "critical_kv", "compactor", "lag_kv", "kv_zip", "sparse_mm", "ranked_bits_repeated")
PARTS = (
    "vl_cache",
    "vl_cache_shared",
    "vl_cache_candidates",
    "vl_cache_tokens",
    "look_m",
    "streaming_llm",
    "full_cache",
    "recipe",
)
FEW = ("vl_cache", "vl_cache_candidates", "full_cache")


def over(names, thorough=(), bits=()):
    """`policy` over these methods; those of `thorough` and `bits` with that mark."""
    marks = {name: [pytest.mark.thorough] * (name in thorough) + [pytest.mark.bits] * (name in bits) for name in names}
    return pytest.mark.parametrize(
        "policy",
        [pytest.param(WITH_FULL[name], id=name, marks=marks[name]) for name in names],
        scope="module",  # so that a method's tests follow one another, and its programs are compiled once
    )


methods, parts = over(list(METHODS), thorough=NEWER), over(PARTS, thorough=("recipe",))
few_methods, few_and_recipe = over(FEW, bits=FEW[:1]), over((*FEW, "recipe"), thorough=("recipe",), bits=FEW[:1])
around_methods = over((*FEW, "recipe"), thorough=(*FEW[1:], "recipe"), bits=FEW[:1])


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


def generate(llava, batch, policy, **options):
    model, params = llava
    return vlc.generate(model, params, batch, policy, NEW, eos_token_ids=[], **options)


@functools.cache
def compiled(policy):
    """(prefill with its report, how often it was traced). Of a stub: what is kept depends on its queries, keys only."""
    traces = []

    @jax.jit
    def run(params, batch):
        traces.append(1)
        ctx = vlc.prefill(StubModel(), params, batch, policy)
        _, state = ctx.start(NEW)
        return state, ctx.report.of_answers(state)

    return run, traces


def prefilled(policy, seed=0):
    """(state, report, batch) of four rows of up to 240 tokens: the same program for every test."""
    batch = ragged_batch(rows=4, length=240, seed=seed)
    return *compiled(policy)[0](stub_params(batch, seed), batch), batch


@methods
def test_one_compilation_whatever_the_prompts_hold(policy):
    kept = [np.asarray(prefilled(policy, seed)[1].kept) for seed in range(5)]
    assert len(compiled(policy)[1]) == 1
    assert any(not np.array_equal(kept[0], other) for other in kept[1:])


@few_and_recipe
def test_a_whole_answer_inside_a_jitted_function_with_other_work(llava, policy):
    """It equals the plain one, the report included, from one compilation whatever the prompts hold."""
    model, params = llava
    traces = []

    @jax.jit
    def train_like(params, batch):
        traces.append(1)
        out = vlc.generate(model, params, batch, policy, NEW, eos_token_ids=[])
        reward = jnp.mean(out.tokens.astype(jnp.float32))
        return out, jax.grad(lambda p: jnp.sum(p["decoder"]["final_norm"]["scale"]) * reward)(params)

    for seed in range(3):
        batch = ragged_batch(rows=4, seed=seed)
        jitted, gradient = train_like(params, batch)
        plain = generate(llava, batch, policy)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), plain, jitted))
        assert float(gradient["decoder"]["final_norm"]["scale"][0]) > 0
    assert len(traces) == 1


@methods
def test_memory_is_freed(policy):
    state, report, _ = prefilled(policy)
    full, full_report, _ = prefilled(vlc.FullCache())
    real, whole = (sum(x.nbytes for x in jax.tree.leaves(s.stores)) for s in (state, full))
    assert report.state_bytes == real
    assert report.full_bytes == full_report.state_bytes == whole
    slack = (3 * 15 + 15) / (3 * 240) + 0.01  # alignment of segments and pool; the paper's total may be 1 % above
    budget = policy.budget.count / 240 if isinstance(policy.budget, vlc.Tokens) else policy.budget
    budget = policy.budget.cap if isinstance(policy.budget, vlc.Mass) else budget
    if isinstance(policy.budget, vlc.ByteShare):  # of two bytes a number; here it has four, and tiny heads
        assert real / whole <= policy.budget.share + 3 * 63 / (3 * 240)
    elif policy.bits is not None:  # scales, of tiny heads: test_quantised_stores counts them
        assert state.context.nbytes / whole <= 2 * (budget + slack)
        assert real < whole
    elif policy.evicted == vlc.Drop():
        assert real / whole <= budget + slack
    else:
        assert state.context.nbytes / whole <= budget + slack
        assert real < whole


@methods
def test_kept_tokens_are_the_budget(policy):
    _, report, _ = prefilled(policy, seed=1)
    lengths = np.asarray(report.prompt_lengths)
    total = np.asarray(report.kept_fraction) * 3 * lengths  # of a KV head on average
    if isinstance(policy.budget, vlc.Tokens):
        wanted = 3 * np.minimum(policy.budget.count, lengths)
    elif isinstance(policy.budget, vlc.Mass):
        assert np.all(total <= policy.budget.cap * 3 * lengths + 1e-3)
        wanted = np.asarray(report.kept).sum(axis=1)
    elif isinstance(policy.budget, vlc.ByteShare):  # 20 bytes at 4 bits (heads of 8, scales padded), 32 in bfloat16
        wanted = [int(3 * n) * 48 // 100 for n in lengths]
    elif policy == METHODS["zip_vl"]:
        assert np.all(total <= np.array([int(3 * n) * 3 // 10 for n in lengths]) + 1e-3)
        wanted = np.asarray(report.kept).sum(axis=1)
    elif policy == METHODS["vl_cache_paper"]:
        wanted = np.asarray(report.kept).sum(axis=1)
    else:
        wanted = [max(3, int(3 * n) * 3 // 10) for n in lengths]
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    most = np.asarray(report.kept).sum(axis=1)
    if policy.sharing.per_head:  # the longest head of a layer counts
        assert np.all(most > total + (1 if policy.name == "ada_kv" else -1e-3))
    else:
        assert np.all(abs(most - total) < 1e-3)


@pytest.mark.parametrize("own_length", [False, *later(True)], ids=["padded", "own"])
@pytest.mark.parametrize("dtype", ["float32", *later("bfloat16")])
@over(PARTS, thorough=("recipe",), bits=FEW[:1])
def test_a_row_does_in_a_batch_what_it_does_alone(policy, dtype, own_length):
    """At the batch's padded length and at 64, in one program for all rows; or at the row's own, a program each.

    The latter for two of the rows in each dtype.
    """
    model, params = llava = tiny_llava(dtype)
    batch = ragged_batch(rows=4, seed=3)
    _, state = vlc.prefill(model, params, batch, policy).start(NEW)
    together = generate(llava, batch, policy)
    lengths = [None] if own_length else [batch.length, 64]
    for row in range(4) if not own_length else (0, 1) if dtype == "float32" else (2, 3):
        for length in lengths:
            alone_batch = one_row(batch, row, length if length != 64 else None)
            if length == 64:
                pad = 64 - alone_batch.length
                alone_batch = dataclasses.replace(
                    alone_batch,
                    tokens=np.pad(alone_batch.tokens, ((0, 0), (0, pad)), constant_values=9),
                    vision_index=np.pad(alone_batch.vision_index, ((0, 0), (0, pad)), constant_values=-1),
                )
            _, alone = vlc.prefill(model, params, alone_batch, policy).start(NEW)
            for layer in range(3):
                expected = np.asarray(alone.kept_positions(layer)[0])
                found = np.asarray(state.kept_positions(layer)[row])[:, : expected.shape[1]]
                np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(generate(llava, alone_batch, policy).tokens[0], together.tokens[row])


@methods
def test_padding_is_never_kept(policy):
    state, report, batch = prefilled(policy, seed=5)
    for layer in kept_sets(state):
        for length, heads in zip(batch.lengths, layer):
            for kept in heads:
                assert np.all(np.diff(kept) > 0)
                assert kept[0] >= 0
                assert kept[-1] == length - 1, "the last prompt token is always kept"
    total = np.asarray(report.kept_fraction) * 3 * batch.lengths  # of a KV head on average
    slots = np.sum([[[len(head) for head in row] for row in layer] for layer in kept_sets(state)], axis=0)
    np.testing.assert_allclose(slots.mean(axis=1), total, rtol=1e-5)
    used = np.sum(np.asarray(state.context.positions) >= 0, axis=2)  # of each lane
    np.testing.assert_allclose(used, np.repeat(2 / used.shape[1] * total[:, None], used.shape[1], axis=1), rtol=1e-5)


@methods
def test_budget_one_keeps_everything(policy):
    assert dataclasses.replace(policy, budget=1.0, candidate_fraction=1.0).keeps_all  # which is all that prefill asks


@few_methods
def test_budget_one_is_no_compression_bit_for_bit(llava, policy):
    model, params = llava
    batch = ragged_batch(rows=4)
    whole = dataclasses.replace(policy, budget=1.0, candidate_fraction=1.0)
    one, full = (vlc.prefill(model, params, batch, p).start(NEW) for p in (whole, vlc.FullCache()))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), one, full))
    np.testing.assert_array_equal(generate(llava, batch, whole).tokens, generate(llava, batch, vlc.FullCache()).tokens)


@over((*PARTS, "ada_kv"), thorough=("recipe",), bits=FEW[:1])
def test_free_slots_are_never_read(llava, policy):
    model, params = llava
    batch = ragged_batch(rows=4, seed=2)
    logits, state = vlc.prefill(model, params, batch, policy).start(NEW)
    token = jnp.argmax(logits, axis=-1)
    free = (state.context.positions < 0)[..., None]
    assert bool(jnp.any(free))
    poison = lambda x: jnp.where(free, jnp.nan, x)  # noqa: E731
    context = dataclasses.replace(state.context, keys=poison(state.context.keys), values=poison(state.context.values))
    tail = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.ndim == 4 else x, state.tail)
    poisoned = dataclasses.replace(state, context=context, tail=tail)
    for _ in range(3):
        clean, state = vlc.decode_step(model, params, token, state)
        dirty, poisoned = vlc.decode_step(model, params, token, poisoned)
        np.testing.assert_array_equal(clean, dirty)
        token = jnp.argmax(clean, axis=-1)


@around_methods
def test_decoding_is_one_loop_on_the_device(llava, policy):
    model, params = llava
    batch = ragged_batch(rows=2)
    jaxpr = jax.make_jaxpr(lambda p, b: vlc.generate(model, p, b, policy, NEW))(params, batch)
    text = str(jaxpr)
    assert "while[" in text
    assert "callback" not in text


@few_and_recipe
def test_streaming_gives_the_same_tokens(llava, policy):
    model, params = llava
    batch = ragged_batch(rows=4)
    whole = np.asarray(generate(llava, batch, policy).tokens)
    stream = vlc.stream(model, params, batch, policy, NEW, eos_token_ids=[])
    np.testing.assert_array_equal(np.stack(list(stream), axis=1), whole)


@parts
def test_step_by_step_gives_the_same_tokens_and_keeps_old_states(llava, policy):
    model, params = llava
    batch = ragged_batch(rows=4)
    whole = np.asarray(generate(llava, batch, policy).tokens)
    logits, state = vlc.prefill(model, params, batch, policy).start(NEW)
    first = state
    tokens = [jnp.argmax(logits, axis=-1)]
    for _ in range(NEW - 1):
        logits, state = vlc.decode_step(model, params, tokens[-1], state)
        tokens.append(jnp.argmax(logits, axis=-1))
    np.testing.assert_array_equal(np.stack(tokens, axis=1), whole)
    assert int(first.tail.length.max()) == 0  # still valid: a branch may start from it
    again, _ = vlc.decode_step(model, params, tokens[0], first)
    np.testing.assert_array_equal(jnp.argmax(again, axis=-1), tokens[1])


@around_methods
def test_pmap_gives_the_same_tokens(llava, policy):
    model, params = llava
    batch = ragged_batch(rows=8)
    split = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), batch)
    run = jax.pmap(
        lambda p, b: vlc.generate(model, p, b, policy, NEW, eos_token_ids=[]).tokens,
        in_axes=(None, 0),
        devices=jax.devices()[:4],
    )
    tokens = np.asarray(run(params, split)).reshape(8, NEW)
    np.testing.assert_array_equal(tokens, generate(llava, batch, policy).tokens)


@around_methods
@pytest.mark.parametrize(
    "shape", [pytest.param((8, 1), id="data", marks=pytest.mark.thorough), pytest.param((2, 2), id="data_and_model")]
)
def test_mesh_gives_the_same_tokens(llava, policy, shape):
    model, params = llava
    batch = ragged_batch(rows=8)
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("data", "model"), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = jax.device_put(params, param_shardings(model.abstract_params(), mesh))
    rows = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), batch)
    if shape[1] > 1:
        assert len(placed["decoder"]["layers"]["mlp"]["gate"]["kernel"].sharding.device_set) == 4
        assert not placed["decoder"]["layers"]["mlp"]["gate"]["kernel"].sharding.is_fully_replicated
    out = vlc.generate(model, placed, rows, policy, NEW, eos_token_ids=[])
    _, state = vlc.prefill(model, placed, rows, policy).start(NEW)
    split = NamedSharding(mesh, PartitionSpec("data", "model"))
    for buffers in (state.context.keys, state.context.values, state.tail.keys, state.tail.values):
        assert buffers.sharding.is_equivalent_to(split, buffers.ndim), buffers.sharding
    plain = generate(llava, batch, policy)
    np.testing.assert_array_equal(out.report.kept, plain.report.kept)
    np.testing.assert_array_equal(out.tokens, plain.tokens)


@few_and_recipe
def test_a_step_updates_the_state_in_place(llava, policy):
    model, params = llava
    _, state = vlc.prefill(model, params, ragged_batch(rows=4, length=240), policy).start(128)
    step = jax.jit(lambda p, t, s: advance(model, p, t, s, vlc.Kernels()), donate_argnums=2)
    compiled = step.lower(params, jnp.zeros((4,), jnp.int32), state).compile()
    memory = compiled.memory_analysis()
    buffers = sum(x.nbytes for x in jax.tree.leaves((state.context, state.tail)))
    assert memory.alias_size_in_bytes >= buffers
    assert memory.temp_size_in_bytes < 0.5 * buffers  # a step of this tiny model, not a copy of its state
