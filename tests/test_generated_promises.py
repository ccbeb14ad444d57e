"""What the rules of the generated tokens promise beyond their definitions (`test_generated_references.py`)."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generated_references import program, ragged, scripted_params
from jax.sharding import NamedSharding, PartitionSpec
from stub_model import kept_sets
from tiers import cases, later
from tiny_models import one_row, ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inference.decode_step import advance
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.policies import AccumulatedAttention, policy_by_name
from vlcache_jax.policies.decoding.recompress import recompress
from vlcache_jax.policies.window import forced

RULES = {
    "window": vlc.StreamingLLM(0.4, decoding="window:5"),
    "h2o": vlc.H2O(0.4, decoding="evict"),
    "tova": vlc.TOVA(12, decoding="evict"),
    "recompress": dataclasses.replace(vlc.VLCache(0.4), decoding=vlc.Recompress(6, rows=4)),
}
rules = pytest.mark.parametrize("policy", RULES.values(), ids=RULES, scope="module")
NEW = 30


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@rules
def test_free_slots_are_never_read(policy):
    batch = ragged()
    params = scripted_params(batch, 20)
    clean, dirty = (program(policy, 20)(params, batch, poison)[0] for poison in (False, True))
    np.testing.assert_array_equal(clean, dirty)
    assert np.isfinite(clean).all()


@pytest.mark.bits
@rules
def test_a_row_does_in_a_batch_what_it_does_alone(policy):
    batch = ragged(seed=6)
    params = scripted_params(batch, 20, 6)
    together, _, last = program(policy, 20)(params, batch)
    for row in (1, 2):
        own_params = {name: x[:, row : row + 1] for name, x in params.items()}
        alone, _, own = program(policy, 20)(own_params, one_row(batch, row, batch.length))
        np.testing.assert_allclose(alone[:, 0], together[:, row], atol=1e-6)
        for mine, ours in zip(kept_sets(own), kept_sets(last), strict=True):
            assert [sorted(x) for x in mine[0]] == [sorted(x) for x in ours[row]]


@pytest.mark.bits
@pytest.mark.parametrize("policy", [vlc.VLCache(0.4), *RULES.values()], ids=["append", *RULES], scope="module")
def test_rows_of_different_numbers_of_tokens_give_what_they_give_alone(llava, policy):
    """Row 1 goes on from where it is after four steps, row 0 from its prompt and row 2 after seven."""
    model, params = llava
    batch, ahead = ragged_batch(rows=3), np.array([0, 4, 7])
    step = jax.jit(lambda tokens, state: advance(model, params, tokens, state, vlc.Kernels()))

    def greedy(logits, state, steps):
        tokens = [jnp.argmax(logits, axis=-1).astype(jnp.int32)]
        for _ in range(steps):
            logits, state = step(tokens[-1], state)
            tokens.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return np.stack(tokens, axis=1), logits, state

    start = vlc.prefill(model, params, batch, policy).start(48)
    everything, _, _ = greedy(*start, 24)
    parts = [greedy(*start, n)[1:] for n in ahead]

    def of_rows(*leaves):  # row i of the i-th
        return jnp.stack([leaf[i] for i, leaf in enumerate(leaves)])

    logits, uneven = jax.tree.map(of_rows, *parts)
    assert len(set(uneven.next_position.tolist())) == 3
    tokens, _, last = greedy(logits, uneven, 16)
    for row, n in enumerate(ahead):
        np.testing.assert_array_equal(tokens[row], everything[row, n : n + 17])
    assert last.finite.all()


@pytest.mark.parametrize(
    ("policy", "equal"),
    [
        (vlc.StreamingLLM(0.4, decoding="window:40"), vlc.StreamingLLM(0.4)),
        (dataclasses.replace(vlc.VLCache(0.4), decoding=vlc.Recompress(40)), vlc.VLCache(0.4)),
        (vlc.H2O(90, decoding="evict"), vlc.FullCache()),
        (vlc.TOVA(90, decoding="evict"), vlc.FullCache()),
    ],
    ids=["window", "recompress", "h2o", "tova"],
)
def test_a_large_room_is_no_rule(policy, equal):
    batch = ragged(seed=7)
    params = scripted_params(batch, 30, 7)
    ruled, plain = (program(p, 30)(params, batch)[0] for p in (policy, equal))
    np.testing.assert_allclose(ruled, plain, atol=1e-5)


def test_a_budget_of_one_evicts_nothing(llava):
    model, params = llava
    batch = ragged_batch(rows=2)
    for decoding in (vlc.Evict(), vlc.Recompress(2)):
        policy = dataclasses.replace(vlc.H2O(1.0), decoding=decoding)
        _, state = vlc.prefill(model, params, batch, policy).start(4)
        assert state.decoding == vlc.Append()


@pytest.mark.parametrize("policy", cases(RULES, ("window", "recompress")), scope="module")
def test_an_answer_longer_than_its_room(llava, policy):
    """Whole and streamed: the same tokens, from one compilation; and the state stays valid."""
    model, params = llava
    batch = ragged_batch(rows=4)
    traces = []

    @jax.jit
    def run(params, batch):
        traces.append(1)
        return vlc.generate(model, params, batch, policy, NEW, eos_token_ids=[]).tokens

    jitted = run(params, batch)
    run(params, ragged_batch(rows=4, seed=1))
    assert len(traces) == 1
    ctx = vlc.prefill(model, params, batch, policy)
    logits, state = ctx.start(NEW)
    before = jax.tree.map(np.asarray, state)
    streamed = list(vlc.stream_decode(model, params, logits, state, NEW, eos_token_ids=[]))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), jitted)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, state)))
    report = ctx.report.of_answers(state)
    rest = (state.next_position, state.next_index, state.allocation, state.finite)
    assert report.state_bytes + report.tail_bytes == sum(x.nbytes for x in jax.tree.leaves(state)) - sum(
        x.nbytes for x in jax.tree.leaves(rest)
    )
    assert bool(jnp.all(report.exact))


def test_recompression_of_heads_that_share_a_lane():
    batch = ragged(seed=8)
    _, _, state = program(RULES["recompress"], 6)(scripted_params(batch, 6, 8), batch)
    full = jnp.ones(batch.size, bool)
    context, parts = state.context, (state.tail, state.observed, state.next_index, full)
    rows, lanes, slots, _ = context.keys.shape
    shared = dataclasses.replace(
        context,
        **{x: getattr(context, x).reshape(rows, 1, lanes * slots, -1) for x in ("keys", "values")},
        positions=context.positions.reshape(rows, 1, -1),
        offsets=context.offsets + slots * jnp.arange(lanes)[None, None],
        lengths=jnp.broadcast_to(context.lengths, (*context.lengths.shape[:2], lanes)),
    )
    run = jax.jit(partial(recompress, state.decoding))
    for apart, together in zip(run(context, *parts), run(shared, *parts), strict=True):
        np.testing.assert_array_equal(apart, together.reshape(apart.shape))
    assert int(jnp.max(run(context, *parts)[2])) == int(jnp.max(batch.lengths)) + 5


def test_recompression_keeps_the_older_of_equals():
    """Queries of zeros look at all that they see alike, so age decides, wherever in its segment a token lies."""
    batch = ragged(seed=8)
    _, _, state = program(RULES["recompress"], 6)(scripted_params(batch, 6, 8), batch)
    context, rule = state.context, state.decoding
    positions = np.array(context.positions)
    segments = [
        (row, lane, slice(start, start + count), count)
        for row, lane in np.ndindex(positions.shape[:2])
        for start, count in zip(np.asarray(context.offsets)[row, :, 0], np.asarray(context.lengths)[row, :, 0])
    ]
    before = []
    for row, lane, inside, _ in segments:
        positions[row, lane, inside] = positions[row, lane, inside][::-1]
        before.append(np.sort(positions[row, lane, inside]))
    alike = jax.tree.map(jnp.zeros_like, state.observed)
    context = dataclasses.replace(context, positions=jnp.asarray(positions))
    full = jnp.ones(batch.size, bool)
    after = np.asarray(jax.jit(partial(recompress, rule))(context, state.tail, alike, state.next_index, full)[2])
    for (row, lane, inside, count), old in zip(segments, before):
        latest, _ = forced(int(count), rule.recent, rule.sinks)
        end = int(state.next_position[row])
        everything = np.concatenate([old, np.arange(end - rule.every, end)])
        expected = np.concatenate([everything[: count - latest], everything[-latest:]])
        np.testing.assert_array_equal(np.sort(after[row, lane, inside]), expected)


def test_rows_end_on_their_own(llava):
    model, params = llava
    logits, state = vlc.prefill(model, params, ragged_batch(rows=4), RULES["h2o"]).start(NEW)
    tokens = np.asarray(vlc.decode(model, params, logits, state, NEW, eos_token_ids=[])[0])
    stop = int(tokens[0, 20])
    out, lengths = vlc.decode(model, params, logits, state, NEW, eos_token_ids=[stop])
    for row in range(4):
        ends = np.flatnonzero(tokens[row] == stop)
        assert int(lengths[row]) == (int(ends[0]) + 1 if len(ends) else NEW)
        np.testing.assert_array_equal(out[row, : lengths[row]], tokens[row, : lengths[row]])


@pytest.mark.parametrize("name", ["recompress", *later("tova")])
def test_mesh_gives_the_same_tokens(llava, name):
    model, params = llava
    batch, policy = ragged_batch(rows=8), RULES[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = jax.device_put(params, param_shardings(model.abstract_params(), mesh))
    rows = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), batch)
    tokens = vlc.generate(model, placed, rows, policy, NEW, eos_token_ids=[]).tokens
    np.testing.assert_array_equal(tokens, vlc.generate(model, params, batch, policy, NEW, eos_token_ids=[]).tokens)


@pytest.mark.parametrize("policy", cases(RULES, ("h2o", "recompress")), scope="module")
def test_a_step_updates_the_state_in_place(llava, policy):
    model, params = llava
    policy = dataclasses.replace(policy, budget=200)
    _, state = vlc.prefill(model, params, ragged_batch(rows=4, length=240), policy).start(4)
    step = jax.jit(lambda p, t, s: advance(model, p, t, s, vlc.Kernels()), donate_argnums=2)
    memory = step.lower(params, jnp.zeros((4,), jnp.int32), state).compile().memory_analysis()
    buffers = sum(x.nbytes for x in jax.tree.leaves((state.context, state.tail, state.observed)))
    assert memory.alias_size_in_bytes >= buffers
    if isinstance(policy.decoding, vlc.RollingWindow):  # of the others, test_tpu_generated.py says what is copied
        assert memory.temp_size_in_bytes < 0.7 * buffers  # a step of this tiny model, not a copy of its state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vlc.RollingWindow(0), r"RollingWindow\(tokens=0\) .* at least 1"),
        (lambda: vlc.Recompress(0), r"Recompress\(every=0\) .* at least 1"),
        (lambda: vlc.Recompress(True), r"every=True"),
        (lambda: vlc.Recompress(8, rows=9), r"at most 8 rows"),
        (lambda: vlc.Recompress(8, recent=1.5), r"recent=1.5"),
        (lambda: vlc.Evict(weigh="max"), r"weigh='max'.* 'sum' or 'last'"),
        (lambda: vlc.Evict(heads="all"), r"heads='all'"),
        (lambda: vlc.Evict(sinks=-1), r"sinks=-1"),
        (lambda: dataclasses.replace(vlc.VLCache(0.2), decoding=vlc.Evict()), r"same number of slots .*Recompress"),
        (
            lambda: dataclasses.replace(vlc.LookM(0.2), decoding=vlc.Evict()),
            r"evicted=Merge.*use bits=None and evicted=Drop",
        ),
        (lambda: vlc.VLCache(0.2, bits=8, decoding=vlc.Recompress()), r"bits=8 .*use bits=None"),
        (lambda: vlc.Policy(name="own", budget=0.2, protect="text", decoding=vlc.Evict()), r"protect='text'"),
        (lambda: dataclasses.replace(vlc.KeyNorm(0.2), decoding=vlc.Evict()), r"weigh='last'"),
        (lambda: dataclasses.replace(vlc.H2O(0.2), decoding=vlc.Evict(heads="shared")), r"one ranking"),
        (lambda: dataclasses.replace(vlc.H2O(0.2), decoding="evict"), r"'evict' is a part of h2o"),
        (lambda: vlc.H2O(0.2, normalised=True, decoding="evict"), r"normalised=False"),
        (lambda: vlc.H2O(vlc.Bytes(10**6), decoding="evict"), r"cannot count budget=1000000 bytes"),
        (lambda: dataclasses.replace(vlc.H2O(8), decoding=vlc.Evict(recent=vlc.Tokens(9))), r"do not fit into"),
        (lambda: vlc.H2O(0.2, decodng="evict"), r"H2O has no option 'decodng': did you mean 'decoding'"),
        (lambda: vlc.TOVA(0.2, decoding="evict:3"), r"decoding='evict:3' is not known: use one of append, .*evict$"),
        (lambda: vlc.StreamingLLM(0.2, decoding="append:3"), r"decoding='append:3' is not known"),
        (lambda: vlc.ZipVL(0.2, decoding=vlc.Append()), r"ZipVL settles decoding itself: use dataclasses.replace"),
        (lambda: vlc.FullCache(decoding=vlc.Append()), r"FullCache settles decoding itself"),
        (lambda: vlc.LookM(0.2, evicted=vlc.Drop()), r"LookM\(evicted=Drop\(\)\): the option is called merge here"),
        (lambda: vlc.SnapKV(0.2, score=AccumulatedAttention()), r"SnapKV settles score itself"),
        (lambda: vlc.StreamingLLM(0.2, recent=0.5), r"StreamingLLM settles recent itself"),
        (lambda: vlc.VLCache(bugdet=0.2), r"VLCache has no option 'bugdet': did you mean 'budget'"),
        (lambda: vlc.RandomEviction(seed=2.5), r"seed=2.5"),
        (lambda: vlc.RandomEviction(seed=2**64), r"seed=18446744073709551616"),
        (lambda: vlc.H2O(0.2, decoding="evit"), r"'evit' is not known: use one of append, .*evict"),
        (lambda: policy_by_name("vl_cache", decoding="evict"), r"'evict' is a part of h2o"),
        (lambda: policy_by_name("vl_cache", decoding="window:x"), r"window:TOKENS"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_made(make, message):
    with pytest.raises(vlc.PolicyError, match=message):
        make()


def test_rules_by_name():
    assert policy_by_name("h2o", budget=0.2, decoding="evict").rule == vlc.Evict(recent=0.5, sinks=0)
    assert policy_by_name("vl_cache", decoding="recompress:64").decoding == vlc.Recompress(64)
    assert policy_by_name("full_cache", decoding="window:9").decoding == vlc.RollingWindow(9)
    assert policy_by_name("streaming_llm", decoding="window").decoding == vlc.RollingWindow(256)
    assert vlc.TOVA(0.2).decoding == vlc.Append()
    assert vlc.TOVA(0.2).score == AccumulatedAttention("shared")


def test_an_answer_must_fit_the_models_positions(llava):
    model, params = llava
    logits, state = vlc.prefill(model, params, ragged_batch(rows=1), RULES["window"]).start(4)
    with pytest.raises(vlc.InputError, match="at least 1"):
        vlc.decode(model, params, logits, state, 0)
    with pytest.raises(vlc.InputError, match="the model has 256"):
        vlc.decode(model, params, logits, state, 256)
