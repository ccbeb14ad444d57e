"""Rows that are filled anew while others go on: a refilled row equals a fresh one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiers import later
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inference.loop import chunk
from vlcache_jax.inference.rows import insert_rows
from vlcache_jax.parallel.params import param_shardings

PROMPTS, ROWS, ROOM = 4, 3, 16
SAMPLINGS = (
    None,
    vlc.Sampling(temperature=2.0),
    vlc.Sampling(temperature=3.0, top_k=4),
    vlc.Sampling(temperature=1.5, top_p=0.6),
)
POLICIES = {
    "vl_cache": vlc.VLCache(budget=0.4),
    "full_cache": vlc.FullCache(),
    "ada_kv": vlc.AdaKV(budget=0.4, window=4),
    "quantised": vlc.ZipVL(budget=0.4),
    "window": vlc.SnapKV(budget=0.4, window=4, decoding=vlc.RollingWindow(4)),
    "evict": vlc.H2O(budget=0.4, decoding="evict"),
    "recompress": vlc.SnapKV(budget=0.4, window=4, decoding=vlc.Recompress(4)),
}
policies = pytest.mark.parametrize("name", ["vl_cache", *later(*[name for name in POLICIES if name != "vl_cache"])])


@functools.cache
def context(name):
    """One context of all prompts."""
    model, params = tiny_llava(layers=2)
    return vlc.compress(model, params, ragged_batch(rows=PROMPTS, length=40), POLICIES[name])


@functools.cache
def fresh(name, asked):
    """The state in which an answer has ended that began in row 0 of free rows and was alone."""
    ctx = context(name)
    state = vlc.insert(vlc.empty_rows(ctx, ROWS, ROOM), 0, ctx, **asked.options)
    return jax.tree.map(np.asarray, vlc.decode_chunk(ctx.model, ctx.params, state, 100))


@dataclasses.dataclass(frozen=True)
class Asked:
    of: int
    length: int
    sampling: int
    seed: int
    stops: tuple

    @property
    def options(self):
        return {
            "of": self.of,
            "max_new_tokens": self.length,
            "sampling": SAMPLINGS[self.sampling],
            "seed": self.seed,
            "eos_token_ids": self.stops,
        }


ASKED = st.builds(
    Asked,
    of=st.integers(0, PROMPTS - 1),
    length=st.integers(1, ROOM),
    sampling=st.integers(0, len(SAMPLINGS) - 1),
    seed=st.integers(0, 2),
    stops=st.sampled_from([(), (7, 11, 30, 41), (3, 9, 20, 33, 50)]),
)


def run(name, queue, steps, leave_after):
    """Answers all of a queue, and checks every answer when its row has ended: each row of all but cache alike."""
    ctx = context(name)
    state = vlc.empty_rows(ctx, ROWS, ROOM)
    waiting, running = list(queue), {}
    while waiting or running:
        done = np.asarray(state.done)
        for row, asked in [(row, asked) for row, asked in running.items() if done[row]]:
            expected = fresh(name, asked)
            length = int(expected.step[0])
            assert int(state.step[row]) == length
            assert bool(state.kv.finite[row])
            np.testing.assert_array_equal(state.tokens[row], expected.tokens[0])
            assert int(state.kv.next_position[row]) == int(expected.kv.next_position[0])
            del running[row]
        for row in [row for row in range(ROWS) if row not in running]:
            if waiting and (len(waiting) + row) % 4:  # not every row at once
                running[row] = waiting.pop(0)
                state = vlc.insert(state, row, ctx, **running[row].options)
        if running or waiting:
            state = vlc.decode_chunk(ctx.model, ctx.params, state, steps, leave_after=leave_after)
        if not running and waiting:
            running[0] = waiting.pop(0)
            state = vlc.insert(state, 0, ctx, **running[0].options)
    return state


def arrivals(most):
    return given(queue=st.lists(ASKED, min_size=4, max_size=most), steps=st.integers(1, 9), leave=st.integers(1, ROWS))


@policies
def test_a_refilled_row_equals_a_fresh_one(name):
    @settings(max_examples=12, deadline=None, derandomize=True)
    @arrivals(10)
    def check(queue, steps, leave):
        run(name, queue, steps, leave)

    check()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["vl_cache", "recompress"])
def test_thousands_of_arrivals(name):
    @settings(max_examples=100, deadline=None)
    @arrivals(40)
    def check(queue, steps, leave):
        run(name, queue, steps, leave)

    check()


@policies
def test_the_cache_of_a_refilled_row_too_bit_for_bit(name):
    """Row 0 answers something else first, while others go on; all that the row may read is as if it were fresh."""
    ctx = context(name)
    first, asked = Asked(1, 9, 1, 5, ()), Asked(2, 7, 2, 1, ())
    state = vlc.empty_rows(ctx, ROWS, ROOM)
    for row, other in enumerate((first, Asked(0, 16, 3, 2, ()), Asked(3, 3, 0, 0, ()))):
        state = vlc.insert(state, row, ctx, **other.options)
    state = vlc.decode_chunk(ctx.model, ctx.params, state, 20, leave_after=2)
    assert state.done.tolist() == [True, False, True]
    state = vlc.insert(state, 0, ctx, **asked.options)
    again = vlc.insert(vlc.empty_rows(ctx, ROWS, ROOM), 0, ctx, **asked.options)
    for _ in range(asked.length - 1):
        assert not state.done[0]
        state, again = (vlc.decode_chunk(ctx.model, ctx.params, s, 1) for s in (state, again))
        assert int(state.step[0]) == int(again.step[0])
        length = int(again.kv.tail.length[0])
        assert int(state.kv.tail.length[0]) == length
        for one, other in ((state.kv.context, again.kv.context), (state.kv.observed, again.kv.observed)):
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), one, other)
        if again.kv.tail.capacity:
            held = np.arange(again.kv.tail.keys.shape[2]) % again.kv.tail.capacity < length
            for pool in ("keys", "values"):
                a, b = (np.asarray(getattr(s.kv.tail, pool))[0][:, held] for s in (state, again))
                np.testing.assert_array_equal(a, b)
    assert bool(state.done[0])
    np.testing.assert_array_equal(state.tokens[0], again.tokens[0])


@policies
def test_rows_answer_what_generate_does(name):
    ctx = context(name)
    model, params = ctx.model, ctx.params
    options = {"sampling": SAMPLINGS[2], "eos_token_ids": [7, 11]}
    expected = vlc.answer(ctx, None, ROOM, seeds=[3, 4, 5, 6], **options)
    state = vlc.empty_rows(ctx, PROMPTS, ROOM)
    for row in range(PROMPTS):
        state = vlc.insert(state, row, ctx, ROOM, of=row, seed=3 + row, **options)
    state = vlc.decode_chunk(model, params, state, ROOM)
    np.testing.assert_array_equal(state.tokens, expected.tokens)
    np.testing.assert_array_equal(state.step, expected.lengths)


def test_one_program_for_all():
    ctx = context("vl_cache")
    state = vlc.insert(vlc.empty_rows(ctx, ROWS, ROOM), 0, ctx, 3)
    state = vlc.decode_chunk(ctx.model, ctx.params, state, 2)
    counts = insert_rows._cache_size(), chunk._cache_size()
    for i in range(12):
        asked = Asked(i % PROMPTS, 1 + i, i % 4, i, tuple(range(i % 8)))
        state = vlc.insert(state, i % ROWS, ctx, **asked.options)
        state = vlc.decode_chunk(ctx.model, ctx.params, state, 1 + i, leave_after=1 + i % 3)
    assert (insert_rows._cache_size(), chunk._cache_size()) == counts


def test_the_loop_is_left_when_enough_rows_have_ended():
    ctx = context("vl_cache")
    state = vlc.empty_rows(ctx, ROWS, ROOM)
    for row, length in enumerate((3, 8, 6)):
        state = vlc.insert(state, row, ctx, length, eos_token_ids=[])
    after = []
    for leave in (1, 1, 1, 1):
        state = vlc.decode_chunk(ctx.model, ctx.params, state, 50, leave_after=leave)
        after.append(state.step.tolist())
    assert after == [[3, 3, 3], [3, 6, 6], [3, 8, 6], [3, 8, 6]]
    state = vlc.decode_chunk(ctx.model, ctx.params, vlc.insert(state, 2, ctx, 9, eos_token_ids=[]), 4)
    assert state.step.tolist() == [3, 8, 5]


def test_free_rows_and_slots_are_never_read():
    """Whatever lies in the tail of a row that is filled, and in rows that are not: NaN changes nothing."""
    ctx = context("vl_cache")
    clean, dirty = (vlc.empty_rows(ctx, ROWS, ROOM) for _ in range(2))
    tail = dataclasses.replace(dirty.kv.tail, keys=dirty.kv.tail.keys + jnp.nan, values=dirty.kv.tail.values + jnp.nan)
    dirty = dataclasses.replace(dirty, kv=dataclasses.replace(dirty.kv, tail=tail))
    states = [vlc.insert(state, 1, ctx, 9, eos_token_ids=[]) for state in (clean, dirty)]
    clean, dirty = (vlc.decode_chunk(ctx.model, ctx.params, state, 50) for state in states)
    np.testing.assert_array_equal(clean.tokens[1], dirty.tokens[1])
    assert bool(dirty.kv.finite[1])


def test_a_row_that_is_not_finite_spoils_no_other_and_may_be_filled_again():
    ctx = context("vl_cache")
    bad = dataclasses.replace(ctx, logits=ctx.logits.at[1].set(jnp.nan))
    state = vlc.insert(vlc.empty_rows(ctx, ROWS, ROOM), 0, bad, 4, of=1)
    state = vlc.insert(state, 1, ctx, 4)
    state = vlc.decode_chunk(ctx.model, ctx.params, state, 10)
    assert state.kv.finite[:2].tolist() == [False, True]
    state = vlc.decode_chunk(ctx.model, ctx.params, vlc.insert(state, 0, ctx, 4, of=1), 10)
    assert state.kv.finite[:2].tolist() == [True, True]


def test_on_a_mesh():
    ctx = context("vl_cache")
    model, params = ctx.model, ctx.params
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    placed = jax.device_put(params, param_shardings(model.abstract_params(), mesh))
    batch = jax.device_put(ragged_batch(rows=PROMPTS, length=40), NamedSharding(mesh, PartitionSpec("data")))
    there = vlc.compress(model, placed, batch, POLICIES["vl_cache"])
    tokens = []
    for one in (ctx, there):
        state = vlc.empty_rows(one, 8, ROOM)
        for row in (6, 1, 3):
            state = vlc.insert(state, row, one, 9, of=row % PROMPTS, sampling=SAMPLINGS[2], seed=row, eos_token_ids=[])
        state = vlc.decode_chunk(model, one.params, state, 4)
        state = vlc.decode_chunk(model, one.params, vlc.insert(state, 2, one, 5, eos_token_ids=[]), 50)
        tokens.append(np.asarray(state.tokens)[[6, 1, 3, 2]])
    split = NamedSharding(mesh, PartitionSpec("data", "model"))
    for pool in (state.kv.context.keys, state.kv.tail.keys):
        assert pool.sharding.is_equivalent_to(split, 4), pool.sharding
    np.testing.assert_array_equal(*tokens)


def moved(ctx, positions):
    ctx = dataclasses.replace(ctx, next_position=ctx.next_position + positions)
    return jax.block_until_ready(ctx)  # insert checks the positions only of a context that has been computed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, c: vlc.insert(s, 3, c, 4), "row=3 does not exist: there are rows 0 to 2"),
        (lambda s, c: vlc.insert(s, 0, c, 4, of=4), "of=4 does not exist: there are rows 0 to 3"),
        (lambda s, c: vlc.insert(s, 0, c, 17), "max_new_tokens=17 is more than the 16 tokens"),
        (lambda s, c: vlc.insert(s, 0, c, 0), "max_new_tokens=0"),
        (lambda s, c: vlc.insert(s, 0, c, 4, eos_token_ids=range(9)), "9 stop ids are more than the 8"),
        (
            lambda s, c: vlc.insert(s, 0, context("full_cache"), 4),
            "a row of the context has context.keys of float32",
        ),
        (
            lambda s, c: vlc.insert(s, 0, context("evict"), 4),
            "rule for generated tokens is Evict.*state is Append",
        ),
        (
            lambda s, c: vlc.insert(s, 0, moved(c, 240), 9),
            "the model has 256",
        ),
        (lambda s, c: vlc.decode_chunk(c.model, c.params, s, 0), "steps=0"),
        (lambda s, c: vlc.decode_chunk(c.model, c.params, s, 1, leave_after=0), "leave_after=0"),
        (lambda s, c: vlc.empty_rows(c, 0, 4), "rows=0"),
        (lambda s, c: vlc.empty_rows(c, 4, 0), "max_new_tokens=0"),
    ],
)
def test_bad_input(call, message):
    ctx = context("vl_cache")
    with pytest.raises(vlc.InputError, match=message):
        call(vlc.empty_rows(ctx, ROWS, ROOM), ctx)
