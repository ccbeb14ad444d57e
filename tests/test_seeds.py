"""Seeds of every kind, and draws that depend on them alone, whatever JAX is set to."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stub_model import StubModel, kept_sets, stub_batch, stub_params
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inference.next_token import next_token
from vlcache_jax.inference.row_options import RowOptions
from vlcache_jax.parallel.seeds import random_bits, seed_words, uniform

KEY = jax.random.key(7, impl="threefry2x32")
SETTINGS = {
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "unsafe_rbg": lambda: jax.default_prng_impl("unsafe_rbg"),
    "not_partitionable": lambda: jax.threefry_partitionable(False),
    "x64": lambda: jax.enable_x64(True),
    "none": contextlib.nullcontext,
}
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
LOGITS = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)


def draws(logits, seeds, steps=8):
    rows = np.ones(len(logits), np.int32)
    floats, none = rows.astype(np.float32), np.zeros(len(rows), bool)
    options = RowOptions(seeds, 3 * floats, 99 * rows, floats, -rows[:, None], rows, none)
    draw = jax.jit(next_token)
    return np.stack([draw(logits, options, step * rows)[0] for step in range(steps)], axis=1)


@settings
def test_a_draw_depends_on_no_setting_and_no_other_row(setting):
    words = seed_words([3, 5, 2**40, -1, 5], (5,))
    expected = draws(LOGITS, words)
    with setting():
        np.testing.assert_array_equal(draws(LOGITS, words), expected)
        for row in range(5):
            np.testing.assert_array_equal(draws(LOGITS[row:][:1], words[row:][:1])[0], expected[row])


@settings
def test_random_eviction_depends_on_no_setting(setting):
    batch, policy = stub_batch(), vlc.RandomEviction(0.3, seed=2**33 + 1)
    expected = kept_sets(vlc.prefill(StubModel(), stub_params(batch), batch, policy).start(1)[1])
    with setting():
        assert kept_sets(vlc.prefill(StubModel(), stub_params(batch), batch, policy).start(1)[1]) == expected


def test_draws_are_those_of_jax_by_default():
    key = jax.random.fold_in(KEY, 3)
    bits = random_bits(seed_words(7, ()), (3,), 100)
    np.testing.assert_array_equal(bits, jax.random.bits(key, (100,)))
    np.testing.assert_array_equal(uniform(bits), jax.random.uniform(key, (100,)))


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        (2**31, [[0, 2**31]] * 3),
        (2**32 + 5, [[1, 5]] * 3),
        (2**63, [[2**31, 0]] * 3),
        (-2, [[2**32 - 1, 2**32 - 2]] * 3),
        ([1, 2**40, -1], [[0, 1], [256, 0], [2**32 - 1] * 2]),
        (np.int64(-2), [[2**32 - 1, 2**32 - 2]] * 3),
        (np.array([1, 2, 2**64 - 1], np.uint64), [[0, 1], [0, 2], [2**32 - 1] * 2]),
        (np.array([1, 2, 2**32 - 1], np.uint32), [[0, 1], [0, 2], [0, 2**32 - 1]]),
        (np.array([4], np.int8), [[0, 4]] * 3),
        (jnp.array([1, -1, 3]), [[0, 1], [2**32 - 1] * 2, [0, 3]]),
        (jnp.array([1, 2**32 - 1, 3], jnp.uint32), [[0, 1], [0, 2**32 - 1], [0, 3]]),
        (KEY, [[0, 7]] * 3),
        ([KEY, KEY, KEY], [[0, 7]] * 3),
        (jax.random.key_data(KEY), [[0, 7]] * 3),
        (np.asarray(jax.random.key_data(KEY)), [[0, 7]] * 3),
        (jax.random.split(KEY, 3), np.asarray(jax.random.key_data(jax.random.split(KEY, 3))).tolist()),
    ],
)
def test_seeds_of_many_kinds(seeds, words):
    assert np.asarray(seed_words(seeds, (3,))).tolist() == words


def test_wide_integers_of_jax():
    with jax.enable_x64(True):
        assert seed_words(jnp.array([2**40 + 1, -1]), (2,)).tolist() == [[256, 1], [2**32 - 1] * 2]


def test_keys_of_another_implementation_differ_row_by_row():
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 4)
    words = np.asarray(seed_words(keys, (4,)))
    assert len({tuple(word) for word in words.tolist()}) == 4
    np.testing.assert_array_equal(seed_words(jax.random.key_data(keys), (4,)), words)
    np.testing.assert_array_equal(seed_words(keys[2:3], (1,))[0], words[2])


def test_samples_take_the_seeds_that_follow():
    assert seed_words(2**32 - 1, (2, 3), 3)[1].tolist() == [[0, 2**32 - 1], [1, 0], [1, 1]]
    assert seed_words(KEY, (2,), 2).tolist() == [[0, 7], [0, 8]]


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (2**64, "seeds=18446744073709551616 is out of range: give integers from"),
        (-(2**63) - 1, "is out of range"),
        (2.5, "seeds=2.5: give integers, or keys"),
        (True, "seeds=True: give integers"),
        ([1, 2.0], "seeds=2.0"),
        ("7", "seeds='7'"),
        (None, "seeds=None"),
        ([], r"seeds=\[\]"),
        ([1, [2]], "one for each answer"),
        (jnp.array([1.0, 2.0]), "give integers"),
        ([1, 2, 3], r"seeds of shape \(3,\) do not fit 2 rows"),
        (jnp.array([1, 2], jnp.uint32), "integers or a key of the old style"),
    ],
)
def test_what_is_no_seed(seeds, message):
    with pytest.raises(vlc.InputError, match=message):
        seed_words(seeds, (2,))


def test_everything_that_samples_takes_keys_and_large_integers():
    model, params = tiny_llava()
    batch, policy = ragged_batch(rows=2), vlc.FullCache()
    options = {"sampling": vlc.Sampling(temperature=4.0), "eos_token_ids": []}
    for seeds in (2**40, jax.random.key(3), jax.random.split(jax.random.key(3), 2)):
        tokens = np.asarray(vlc.generate(model, params, batch, policy, 4, seeds=seeds, **options).tokens)
        streamed = list(vlc.stream(model, params, batch, policy, 4, seeds=seeds, **options))
        np.testing.assert_array_equal(np.stack(streamed, axis=1), tokens)
        logits, state = vlc.prefill(model, params, batch, policy).start(4)
        np.testing.assert_array_equal(vlc.decode(model, params, logits, state, 4, seeds=seeds, **options)[0], tokens)
        out = vlc.answer(vlc.compress(model, params, batch, policy), max_new_tokens=4, seeds=seeds, **options)
        np.testing.assert_array_equal(out.tokens, tokens)
