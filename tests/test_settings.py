"""What users set in JAX changes no answer: 64-bit mode, and what forbids transfers that nobody asked for.

The whole suite runs with JAX_NUMPY_DTYPE_PROMOTION=strict and JAX_NUMPY_RANK_PROMOTION=raise (conftest.py).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stub_model import StubModel, kept_sets, stub_batch, stub_params
from test_generated_promises import RULES
from test_promises import METHODS
from tiers import cases, later
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.kernels.attention import attention
from vlcache_jax.kernels.column_statistics import column_statistics
from vlcache_jax.kernels.decode_attention import decode_attention
from vlcache_jax.kernels.quantisation import quantise_keys, quantise_values

NEW = 8
WHOLE = {
    "full_8_bits": vlc.FullCache(bits=8),
    "vl_cache": vlc.VLCache(0.3),
    "look_m": vlc.LookM(0.3),
    "ada_kv": vlc.AdaKV(0.3, window=4),
    "zip_vl": vlc.ZipVL(0.3),
    "h2o": RULES["h2o"],
    "window": RULES["window"],
    "recompress": RULES["recompress"],
}


@pytest.fixture(scope="module")
def llava():
    model, params = tiny_llava()
    return model, jax.tree.map(jnp.asarray, params)


def same(one, other):
    """Equal leaf by leaf, in bits and in type, and none of 64 bits."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert a.dtype.itemsize < 8
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("policy", cases(WHOLE, ("full_8_bits",)))
def test_answers_in_64_bit_mode(llava, policy):
    model, params = llava
    batch = ragged_batch(rows=3)
    options = {"eos_token_ids": [], "sampling": vlc.Sampling(temperature=2.0, top_k=30, top_p=0.9), "seeds": 2**40}
    plain = vlc.generate(model, params, batch, policy, NEW, **options)
    with jax.enable_x64(True):
        wide = vlc.generate(model, params, batch, policy, NEW, **options)
        same(wide, plain)
    np.testing.assert_array_equal(wide.tokens, plain.tokens)


@pytest.mark.thorough
def test_streams_contexts_and_steps_in_64_bit_mode(llava):
    model, params = llava
    batch = ragged_batch(rows=2)
    questions = vlc.Continuation(np.full((2, 2, 3), 7), np.array([[3, 1], [2, 3]]))  # i64, as numpy makes them

    def run():
        streamed = list(vlc.stream(model, params, batch, vlc.VLCache(0.3), 4, eos_token_ids=[]))
        context = vlc.compress(model, params, batch, vlc.VLCache(0.3))
        out = vlc.answer(context, questions, 4, eos_token_ids=[])
        context = vlc.extend(vlc.extend(context, questions, out), vlc.Continuation(np.full((4, 2), 9), np.full(4, 2)))
        logits, state = context.start(4)
        _, state = vlc.decode_step(model, params, np.argmax(logits, axis=-1), state)
        return streamed, out, vlc.answer(context, None, 4, eos_token_ids=[]), state

    plain = run()
    with jax.enable_x64(True):
        same(run(), plain)


@pytest.mark.thorough
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_same_in_64_bit_mode(name):
    batch = stub_batch()
    kept = kept_sets(vlc.prefill(StubModel(), stub_params(batch), batch, METHODS[name]).start(4)[1])
    with jax.enable_x64(True):
        state = vlc.prefill(StubModel(), stub_params(batch), batch, METHODS[name]).start(4)[1]
        assert kept_sets(state) == kept
        assert all(x.dtype.itemsize < 8 for x in jax.tree.leaves(state))


STATISTICS, DECODE = ("pallas_tpu", "xla", "xla_columns", "reference"), ("pallas_tpu", "xla", "xla_wide", "reference")


def attend(name):
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 128, heads, 64)), jnp.float32) for heads in (2, 1))
    return attention, (query, key, key), {}


def statistics(name, with_lse):
    (query, key, _), index = attend(name)[1], jnp.array([100], jnp.int32)
    lse = {"lse": jnp.ones((1, 128, 2), jnp.float32)} if with_lse else {}
    return column_statistics, (query, key, index, index - 80), lse


def decode(name, bits):
    query, store, _ = attend(name)[1]
    store = jnp.concatenate([store, store], axis=1).swapaxes(1, 2)
    segments = jnp.array([[128]], jnp.int32), jnp.array([[40]], jnp.int32)
    if bits is None:
        return decode_attention, (query[:, 0], store, store, *segments), {}
    (keys, key_scales), (values, value_scales) = quantise_keys(store, bits), quantise_values(store, bits)
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    return partial(decode_attention, bits=bits), (query[:, 0], keys, values, *segments), scales


@pytest.mark.parametrize(
    ("make", "name", "rest"),
    [
        *((attend, name, ()) for name in ("splash_tpu", "xla", "reference")),
        *((statistics, name, (lse,)) for name in STATISTICS for lse in (False, True)),
        *((decode, name, (bits,)) for name in DECODE for bits in (None, 4)),
    ],
)
def test_kernels_in_64_bit_mode(make, name, rest):
    function, arrays, named = make(name, *rest)
    run = jax.jit(partial(function, implementation=name, interpret=True))
    plain = run(*arrays, **named)
    with jax.enable_x64(True):
        same(run(*arrays, **named), plain)


def test_gradients_in_64_bit_mode(llava):
    model, params = llava
    batch = ragged_batch(rows=2, length=160)  # as long as a TPU's kernel, which is traced here, takes it

    def loss(params):
        return jnp.mean(jax.nn.logsumexp(model.apply({"params": params}, batch, method="forward"), axis=-1))

    plain = jax.jit(jax.grad(loss))(params)
    with jax.enable_x64(True):
        wide = jax.jit(jax.grad(loss))(params)
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["vl_cache", *later("h2o", "recompress")])
def test_nothing_is_transferred_unasked(llava, name):
    model, params = llava
    policy = WHOLE[name]
    batch = ragged_batch(rows=3)
    expected = vlc.generate(model, params, batch, policy, 4, eos_token_ids=[])
    with jax.transfer_guard("disallow"):
        for where in (batch, jax.device_put(batch)):
            out = vlc.generate(model, params, where, policy, 4, eos_token_ids=[])
            streamed = list(vlc.stream(model, params, where, policy, 4, eos_token_ids=[]))
            logits, state = vlc.prefill(model, params, where, policy).start(4)
            decoded = vlc.decode(model, params, logits, state, 4, eos_token_ids=[])
            for tokens in (np.array([7, 8, 9]), [7, 8, 9], jax.device_put(np.array([7, 8, 9], np.int32))):
                logits, state = vlc.decode_step(model, params, tokens, state)
            np.testing.assert_array_equal(jax.device_get(out.tokens), jax.device_get(expected.tokens))
            np.testing.assert_array_equal(np.stack(streamed, axis=1), jax.device_get(expected.tokens))
            np.testing.assert_array_equal(jax.device_get(decoded[0]), jax.device_get(expected.tokens))


@pytest.mark.thorough
def test_contexts_and_samples_transfer_nothing_unasked(llava):
    model, params = llava
    questions = vlc.Continuation(np.full((2, 2, 3), 7, np.int32), np.array([[3, 1], [2, 3]], np.int32))
    with jax.transfer_guard("disallow"):
        context = vlc.compress(model, params, ragged_batch(rows=2), vlc.VLCache(0.3))
        for seeds in (3, np.arange(4, dtype=np.uint32).reshape(2, 2, 1)):
            vlc.answer(context, questions, 4, samples=2, sampling=vlc.Sampling(), seeds=seeds)
        context = vlc.extend(context, questions, vlc.answer(context, questions, 4))
        context = vlc.extend(context, vlc.Continuation(np.full((4, 2), 9, np.int32), np.full(4, 2, np.int32)))
        vlc.answer(context, None, 4)


def test_nothing_is_transferred_unasked_on_a_mesh(llava):
    model, params = llava
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=automatic)
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    batch = ragged_batch(rows=2)
    expected = vlc.generate(*llava, batch, vlc.VLCache(0.3), 4, eos_token_ids=[])
    with jax.transfer_guard("disallow"):
        out = vlc.generate(model, params, batch, vlc.VLCache(0.3), 4, eos_token_ids=[], seeds=[1, 2])
        list(vlc.stream(model, params, batch, vlc.VLCache(0.3), 4))
    np.testing.assert_array_equal(out.tokens, expected.tokens)


def test_a_row_without_room(llava):
    """Refused where it is known, and NaN, not a wrong number, where it is not; the other rows go on."""
    model, params = llava
    logits, state = vlc.prefill(model, params, ragged_batch(rows=2), vlc.VLCache(0.3)).start(NEW)
    expected, _ = vlc.decode_step(model, params, [7, 8], state)
    length = jnp.array([state.tail.capacity, 0], jnp.int32)
    full = dataclasses.replace(state, tail=dataclasses.replace(state.tail, length=length))
    for run in (
        lambda: vlc.decode_step(model, params, [7, 8], full),
        lambda: vlc.decode(model, params, logits, full, 4),
        lambda: list(vlc.stream_decode(model, params, logits, full, 4)),
    ):
        with pytest.raises(vlc.InputError, match="no room for"):
            run()
    logits, after = jax.jit(lambda s: vlc.decode_step(model, params, jnp.array([7, 8]), s))(full)
    assert np.isnan(logits[0]).all()
    np.testing.assert_array_equal(logits[1], expected[1])
    assert after.finite.tolist() == [False, True]
