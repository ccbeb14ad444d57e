"""What can be added from outside: each kind of part by one class here, and no change to the library."""

import dataclasses
import math
from fractions import Fraction

import generated_references as simulated
import jax.numpy as jnp
import numpy as np
import pytest
from generated_references import Row, ragged, scripted_params
from method_references import uniform
from stub_model import KV_HEADS, LAYERS, StubModel, kept_sets, stub_batch, stub_params
from tiers import later
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.cache.geometry import align, regular_slots
from vlcache_jax.kernels.precision import PRECISIONS, Coded, Precision
from vlcache_jax.policies import Allocate, DecodingRule, Evicted, Score
from vlcache_jax.policies.decoding.append import appending
from vlcache_jax.policies.decoding.rule import RULES, named


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@dataclasses.dataclass(frozen=True)
class Anchored(DecodingRule):
    """The first tokens of an answer, and the latest ones, `tokens` of them together."""

    tokens: int = 8
    anchors: int = 3

    def tail_tokens(self, max_new_tokens):
        return self.tokens

    def attend(self, state, kernels, spec):
        length, ring = state.tail.length, self.tokens - self.anchors
        slot = jnp.where(length < self.tokens, length, self.anchors + (length - self.anchors) % ring)
        return appending(state, kernels, spec, slot, jnp.minimum(length + 1, self.tokens))


@pytest.fixture
def anchored(monkeypatch):
    monkeypatch.setitem(RULES, "anchored", None)  # taken away at the end
    return named("anchored", count="TOKENS")(Anchored)


def test_a_decoding_rule(anchored, llava):
    """Known by name; token by token as its definition says; whole, streamed and after a context."""
    batch, steps = ragged(seed=4), 30
    params = scripted_params(batch, steps, 4)
    policy = vlc.StreamingLLM(0.3, decoding="anchored:8")
    assert policy.decoding == anchored(8)
    out, _, _ = simulated.program(policy, steps)(params, batch)
    for number in range(batch.size):
        row = Row(batch, params, number)
        slots = uniform(LAYERS, max(LAYERS, math.floor(LAYERS * row.n * Fraction("0.3"))))

        def step(caches, layer, position, out, row=row, slots=slots):
            answer = list(range(row.n, position + 1))
            s = slots[layer]
            cache = [
                *range(4),
                *range(row.n - s + 4, row.n),
                *(answer if len(answer) <= 8 else answer[:3] + answer[-5:]),
            ]
            for head in range(KV_HEADS):
                part = slice(head * simulated.GROUP, (head + 1) * simulated.GROUP)
                out[layer, part] = row.attend(layer, head, position, cache)[1]

        np.testing.assert_allclose(np.asarray(out)[:, number], simulated._run(row, [], steps, step).out, atol=2e-5)
    model, params = llava
    prompts, policy = ragged_batch(rows=3), vlc.VLCache(0.4, decoding="anchored:8")
    answers = vlc.generate(model, params, prompts, policy, 20, eos_token_ids=[]).tokens
    streamed = list(vlc.stream(model, params, prompts, policy, 20, eos_token_ids=[]))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), answers)
    ctx = vlc.compress(model, params, prompts, policy)
    np.testing.assert_array_equal(vlc.answer(ctx, None, 20, eos_token_ids=[]).tokens, answers)


@dataclasses.dataclass(frozen=True)
class Apart(Evicted):
    """They stay as they are, in a store of their own."""

    saves = True
    keeps_others = True

    def stores(self, selected, layers, kept):
        length = selected.keys.shape[3]
        rest = dataclasses.replace(
            selected, order=selected.others, slots=selected.lengths - selected.slots, others=None
        )
        return (rest.pack(regular_slots(layers, int(align(length)))),)


def test_an_eviction_rule(llava):
    """What is kept and what is kept apart are the full cache together; what cannot work is refused by capability."""
    model, params = llava
    batch = ragged_batch(rows=3)
    policy = dataclasses.replace(vlc.VLCache(0.3), evicted=Apart())
    ctx = vlc.prefill(model, params, batch, policy)
    assert [store.bits for store in ctx.stores] == [None, None]
    full = vlc.generate(model, params, batch, vlc.FullCache(), 12, eos_token_ids=[])
    np.testing.assert_array_equal(vlc.generate(model, params, batch, policy, 12, eos_token_ids=[]).tokens, full.tokens)
    with pytest.raises(vlc.PolicyError, match="a layer loses tokens before"):
        dataclasses.replace(policy, candidate_fraction=0.5)
    with pytest.raises(vlc.PolicyError, match="Evict rewrites single slots"):
        dataclasses.replace(vlc.H2O(0.3, decoding="evict"), evicted=Apart())


@dataclasses.dataclass(frozen=True)
class ValueNorm(Score):
    """The size of what a token would add."""

    needs_attention = False

    def __call__(self, inputs):
        return jnp.linalg.norm(inputs.value.astype(jnp.float32), axis=-1).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class FirstLayerWhole(Allocate):
    """All of the prompt in the first layer, and a token in each of the others."""

    def capacity(self, length, budget):
        return length + budget.layers - 1

    def slots(self, measured, lengths, budget):
        others = jnp.ones((len(lengths), budget.layers - 1), jnp.int32)
        return jnp.concatenate([lengths[:, None], others], axis=1)


def test_a_score_and_an_allocation():
    batch = stub_batch()
    params = stub_params(batch)
    policy = vlc.Policy(name="own", budget=0.4, score=ValueNorm(), allocate=FirstLayerWhole(), recent=0.0)
    kept = kept_sets(vlc.prefill(StubModel(), params, batch, policy).start(4)[1])
    for row, n in enumerate(batch.lengths):
        assert kept[0][row] == [list(range(n))] * KV_HEADS
        assert kept[1][row] == [[n - 1]] * KV_HEADS
    policy = dataclasses.replace(policy, allocate=vlc.policies.Uniform())
    kept = kept_sets(vlc.prefill(StubModel(), params, batch, policy).start(4)[1])
    for row, n in enumerate(batch.lengths):
        for layer in range(LAYERS):
            for head, tokens in enumerate(kept[layer][row]):
                size = np.linalg.norm(params["value"][layer, row, : n - 1, head], axis=-1)
                best = np.argsort(-size, kind="stable")[: len(tokens) - 1]
                assert tokens == [*sorted(best.tolist()), n - 1]


class BySlot(Precision):
    """float8_e4m3fn, scaled per slot."""

    width, group, spans = 8, 1, ((2, 1), (2, 1), (2, 1), (2, 1))

    def encode(self, keys, values, valid):
        def scaled(x):
            x = jnp.where(valid[..., None], x.astype(jnp.float32), 0)
            scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-6) / 448
            return (x / scale[..., None]).astype(jnp.float8_e4m3fn), scale

        (keys, key_scales), (values, value_scales) = scaled(keys), scaled(values)
        return Coded(keys, values, key_scales, value_scales)

    def decode(self, coded):
        def whole(x, scale):
            return x.astype(jnp.float32) * scale[..., None]

        return whole(coded.keys, coded.key_scales), whole(coded.values, coded.value_scales)


class Half(Precision):
    """bfloat16, without scales."""

    width, group, spans = 16, 1, ((2, 1), (2, 1), None, None)

    def encode(self, keys, values, valid):
        return Coded(keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16))

    def decode(self, coded):
        return coded.keys.astype(jnp.float32), coded.values.astype(jnp.float32)


@pytest.fixture(params=["half", *later("by_slot")])
def precision(request, monkeypatch):
    monkeypatch.setitem(PRECISIONS, request.param, {"by_slot": BySlot(), "half": Half()}[request.param])
    return request.param


def test_a_precision(precision, llava, tmp_path):
    """Known by its word: the same tokens kept, what is stored near, bytes counted, saved, read and refused."""
    model, params = llava
    batch, width = ragged_batch(rows=3), PRECISIONS[precision].width
    plain, policy = (vlc.policies.policy_by_name(f"vl_cache:0.4{more}") for more in ("", f",bits={precision}"))
    ctx, exact = (vlc.compress(model, params, batch, p) for p in (policy, plain))
    (store,), (wanted,) = ctx.stores, exact.stores
    assert store.bits == precision
    assert store.keys.dtype == {"by_slot": jnp.float8_e4m3fn, "half": jnp.bfloat16}[precision]
    np.testing.assert_array_equal(store.positions, wanted.positions)
    assert store.keys.nbytes == wanted.keys.nbytes * width // 32
    keys, values = (np.asarray(x) for x in PRECISIONS[precision].decode(Coded(*store.layer(0)[0].coded)))
    used = np.asarray(store.positions) >= 0
    np.testing.assert_allclose(keys[used], np.asarray(wanted.keys)[used], rtol=0.07, atol=0.03)
    assert np.isfinite(values[used]).all()
    answers = [
        vlc.generate(model, params, batch, policy, 12, eos_token_ids=[], kernels=kernels).tokens
        for kernels in (None, vlc.Kernels(decode_attention="reference"))
    ]
    np.testing.assert_array_equal(*answers)
    np.testing.assert_array_equal(vlc.answer(ctx, None, 12, eos_token_ids=[]).tokens, answers[0])
    vlc.save_context(ctx, tmp_path / "ctx")
    again = vlc.load_context(tmp_path / "ctx", model, params)
    assert again.stores[0].bits == precision
    np.testing.assert_array_equal(vlc.answer(again, None, 12, eos_token_ids=[]).tokens, answers[0])
    whole = vlc.prefill(model, params, batch, vlc.FullCache(bits=precision))
    assert whole.stores[0].bits == precision
    others = vlc.prefill(model, params, batch, dataclasses.replace(plain, evicted=vlc.Quantise(precision)))
    assert [x.bits for x in others.stores] == [None, precision]
    small = dataclasses.replace(policy, budget=vlc.Bytes(40_000))
    assert vlc.prefill(model, params, batch, small).report.state_bytes <= 3 * 40_000
    with pytest.raises(vlc.PolicyError, match="is not below bits"):
        dataclasses.replace(policy, evicted=vlc.Quantise(precision))
    with pytest.raises(NotImplementedError, match=f"not bits='{precision}'"):
        vlc.generate(model, params, batch, policy, 2, kernels=vlc.Kernels(decode_attention="pallas_tpu"))
    with pytest.raises(vlc.PolicyError, match=rf"bits='float6' .*: use 8, 4, 2, 4/2, float8 or {precision}"):
        vlc.FullCache(bits="float6")
