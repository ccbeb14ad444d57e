"""Stopping, sampling and the checks of `generate`, `stream`, `prefill` and `decode_step`."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import one_row, ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inference.loop import chunk
from vlcache_jax.inference.prefill import _prefill as prefill_program

NEW = 8
POLICY = vlc.VLCache(budget=0.3)


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


def test_rows_stop_on_their_own_end_token(llava):
    model, params = llava
    batch = ragged_batch(rows=4)
    free = np.asarray(vlc.generate(model, params, batch, POLICY, NEW, eos_token_ids=[]).tokens)
    stop = [int(free[0, 2]), int(free[1, 4])]
    out = vlc.generate(model, params, batch, POLICY, NEW, eos_token_ids=stop)
    for row in range(4):
        ends = np.flatnonzero(np.isin(free[row], stop))
        length = int(ends[0]) + 1 if len(ends) else NEW
        assert int(out.lengths[row]) == length
        np.testing.assert_array_equal(out.tokens[row, :length], free[row, :length])
        np.testing.assert_array_equal(out.tokens[row, length:], 0)
    streamed = np.stack(list(vlc.stream(model, params, batch, POLICY, NEW, eos_token_ids=stop)), axis=1)
    assert streamed.shape[1] == int(out.lengths.max())
    np.testing.assert_array_equal(streamed, out.tokens[:, : streamed.shape[1]])


def test_the_checkpoints_end_tokens_are_the_default(llava):
    model, params = llava
    batch = ragged_batch(rows=4)
    default = vlc.generate(model, params, batch, POLICY, NEW)
    given = vlc.generate(model, params, batch, POLICY, NEW, eos_token_ids=[2])
    np.testing.assert_array_equal(default.tokens, given.tokens)


def test_one_new_token(llava):
    model, params = llava
    batch = ragged_batch(rows=2)
    out = vlc.generate(model, params, batch, POLICY, 1)
    logits, _ = vlc.prefill(model, params, batch, POLICY).start(1)
    np.testing.assert_array_equal(out.tokens[:, 0], jnp.argmax(logits, axis=-1))
    assert out.lengths.tolist() == [1, 1]


def test_a_rows_sample_depends_on_its_seed_only(llava):
    model, params = llava
    batch = ragged_batch(rows=4)
    sampling = vlc.Sampling(temperature=3.0, top_k=30, top_p=0.95)
    seeds = [11, 5, 5, 9]
    options = {"sampling": sampling, "eos_token_ids": []}
    together = np.asarray(vlc.generate(model, params, batch, POLICY, NEW, seeds=seeds, **options).tokens)
    for row in range(4):
        alone = vlc.generate(model, params, one_row(batch, row, batch.length), POLICY, NEW, seeds=seeds[row], **options)
        np.testing.assert_array_equal(alone.tokens[0], together[row])
    other = np.asarray(vlc.generate(model, params, batch, POLICY, NEW, seeds=[12, 5, 5, 9], **options).tokens)
    assert not np.array_equal(other[0], together[0])
    np.testing.assert_array_equal(other[1:], together[1:])
    streamed = np.stack(list(vlc.stream(model, params, batch, POLICY, NEW, seeds=seeds, **options)), axis=1)
    np.testing.assert_array_equal(streamed, together)


def test_rows_with_options_of_their_own(llava):
    model, params = llava
    batch = ragged_batch(rows=3)
    ways = [None, vlc.Sampling(temperature=3.0, top_k=9), vlc.Sampling(temperature=2.0, top_p=0.8)]
    together = vlc.generate(model, params, batch, POLICY, NEW, sampling=ways, seeds=5, eos_token_ids=[])
    stops = [[int(together.tokens[row, 2 * row + 1])] for row in range(3)]
    stopped = vlc.generate(model, params, batch, POLICY, NEW, sampling=ways, seeds=5, eos_token_ids=stops)
    for row, way in enumerate(ways):
        options = {"sampling": way, "seeds": 5}
        alone = vlc.generate(model, params, batch, POLICY, NEW, eos_token_ids=[], **options)
        np.testing.assert_array_equal(alone.tokens[row], together.tokens[row])
        alone = vlc.generate(model, params, batch, POLICY, NEW, eos_token_ids=stops[row], **options)
        np.testing.assert_array_equal(alone.tokens[row], stopped.tokens[row])
        assert stopped.lengths[row] == alone.lengths[row] <= 2 * row + 2


def test_one_program_for_every_temperature_stop_id_and_length(llava):
    model, params = llava
    counts = []
    for prompt in range(20):
        sampling = (None, vlc.Sampling(temperature=2.0, top_k=5 + prompt), vlc.Sampling(top_p=0.5 + prompt / 50))
        options = {"sampling": sampling[prompt % 3], "eos_token_ids": range(prompt % 4)}
        batch = ragged_batch(rows=1, seed=prompt)
        out = vlc.generate(model, params, batch, POLICY, 9 + 3 * (prompt // 7), seeds=prompt, **options)
        assert out.tokens.shape == (1, 9 + 3 * (prompt // 7))
        counts.append((prefill_program._cache_size(), chunk._cache_size()))
    assert set(counts) == {counts[0]}


def test_two_branches_of_one_state(llava):
    model, params = llava
    batch = ragged_batch(rows=2)
    _, state = vlc.prefill(model, params, batch, POLICY).start(NEW)
    a, left = vlc.decode_step(model, params, jnp.array([7, 8]), state)
    b, right = vlc.decode_step(model, params, jnp.array([9, 10]), state)
    again, _ = vlc.decode_step(model, params, jnp.array([7, 8]), state)
    np.testing.assert_array_equal(a, again)
    assert not np.array_equal(a, b)
    assert left.context.keys is not right.tail.keys
    np.testing.assert_array_equal(left.next_position, np.asarray(batch.lengths) + 1)


@pytest.mark.parametrize("tokens", [0, -3, 2.5, True])
def test_max_new_tokens(llava, tokens):
    model, params = llava
    with pytest.raises(vlc.InputError, match="max_new_tokens"):
        vlc.generate(model, params, ragged_batch(rows=1), POLICY, tokens)


def test_positions_of_the_model(llava):
    model, params = llava
    batch = ragged_batch(rows=2)
    room = 256 - int(np.max(batch.lengths))
    with pytest.raises(vlc.InputError, match=r"needs 257 positions .* the model has 256"):
        vlc.generate(model, params, batch, POLICY, room + 1)
    with pytest.raises(vlc.InputError, match="the model has 256"):
        vlc.stream(model, params, batch, POLICY, room + 1)  # when called, not at the first token


def test_seeds_and_policy(llava):
    model, params = llava
    batch = ragged_batch(rows=2)
    with pytest.raises(vlc.InputError, match=r"3,.* do not fit 2 rows"):
        vlc.generate(model, params, batch, POLICY, 4, seeds=[1, 2, 3])
    with pytest.raises(vlc.PolicyError, match="'vl_cache' is not a policy"):
        vlc.generate(model, params, batch, "vl_cache", 4)


def test_a_full_tail(llava):
    model, params = llava
    _, state = vlc.prefill(model, params, ragged_batch(rows=2), POLICY).start(1)
    token = jnp.array([7, 7])
    for _ in range(state.tail.capacity):
        _, state = vlc.decode_step(model, params, token, state)
    with pytest.raises(vlc.InputError, match="no room for another token"):
        vlc.decode_step(model, params, token, state)


@pytest.mark.thorough
def test_nnx_code_can_wrap_the_module(llava):
    from flax import nnx

    model, _ = llava
    batch = ragged_batch(rows=2)
    wrapped = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(batch)
    assert wrapped(batch).shape == (2, batch.length, 64)


def test_several_answers_from_one_prefill(llava):
    model, params = llava
    batch = ragged_batch(rows=2)
    logits, state = vlc.prefill(model, params, batch, POLICY).start(NEW)
    options = {"sampling": vlc.Sampling(temperature=4.0), "eos_token_ids": []}
    for seeds in ([1, 2], [3, 4]):
        streamed = list(vlc.stream_decode(model, params, logits, state, NEW, seeds=seeds, **options))
        tokens, lengths = vlc.decode(model, params, logits, state, NEW, seeds=seeds, **options)
        whole = vlc.generate(model, params, batch, POLICY, NEW, seeds=seeds, **options)
        np.testing.assert_array_equal(np.stack(streamed, axis=1), tokens)
        np.testing.assert_array_equal(tokens, whole.tokens)
        np.testing.assert_array_equal(lengths, whole.lengths)
    with pytest.raises(vlc.InputError, match="must lie between 1 and 16"):
        vlc.decode(model, params, logits, state, 17)
