"""Stores of float8: the error that the format's definition allows, and slots that hold nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.kernels.precision import PRECISIONS
from vlcache_jax.policies import policy_by_name

FLOAT8 = PRECISIONS["float8"]


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


def drawn():
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 2, 3, 64, 16)).astype(np.float32)
    keys[..., 5] *= 30  # a channel of outliers
    valid = np.arange(64) < np.array([64, 20])[:, None, None] + np.zeros((1, 3, 1), int)
    return keys, values, valid


def test_error_is_half_a_step_of_the_format():
    keys, values, valid = drawn()
    coded = FLOAT8.encode(jnp.asarray(keys), jnp.asarray(values), jnp.asarray(valid))
    assert coded.keys.dtype == coded.values.dtype == jnp.float8_e4m3fn
    for x, back, groups in zip((keys, values), FLOAT8.decode(coded), (2, 64), strict=True):
        x = np.where(valid[..., None], x, 0).astype(np.float64)
        by_group = x.reshape(2, 3, groups, -1, 16)  # keys: 32 tokens and a channel; values: a token, all channels
        largest = np.abs(by_group).max(axis=3 if groups == 2 else (3, 4), keepdims=True)
        # Four bits with the leading one, from 2**-6 on; below, steps of 2**-9. The largest is 448.
        allowed = np.maximum(np.abs(by_group) * 2**-4, largest / 448 * 2**-10) * (1 + 1e-5)
        error = np.abs(np.asarray(back, np.float64).reshape(by_group.shape) - by_group)
        assert np.all(error <= allowed)
        assert error.max() > 0.4 * allowed.max()


def test_what_lies_in_free_slots_changes_nothing():
    keys, values, valid = drawn()
    spoilt = (np.where(valid[..., None], x, np.nan) for x in (keys, values))
    for a, b in zip(FLOAT8.encode(keys, values, valid), FLOAT8.encode(*spoilt, valid), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        assert np.isfinite(np.asarray(a, np.float32)).all()


def test_answers_contexts_in_files_and_what_it_costs(llava, tmp_path):
    model, params = llava
    batch = ragged_batch(rows=3)
    plain, policy = vlc.VLCache(0.4), vlc.VLCache(0.4, bits="float8")
    ctx, exact = (vlc.compress(model, params, batch, p) for p in (policy, plain))
    np.testing.assert_array_equal(ctx.report.kept, exact.report.kept)
    (store,) = ctx.stores
    assert store.keys.dtype == jnp.float8_e4m3fn
    tokens = vlc.answer(ctx, None, 8, eos_token_ids=[]).tokens
    reference = vlc.Kernels(decode_attention="reference")
    again = vlc.generate(model, params, batch, policy, 8, eos_token_ids=[], kernels=reference).tokens
    np.testing.assert_array_equal(tokens, again)
    vlc.save_context(ctx, tmp_path / "ctx")
    loaded = vlc.load_context(tmp_path / "ctx", model, params)
    np.testing.assert_array_equal(vlc.answer(loaded, None, 8, eos_token_ids=[]).tokens, tokens)


def test_by_name():
    assert policy_by_name("vl_cache:0.1,bits=float8") == vlc.VLCache(0.1, bits="float8")
