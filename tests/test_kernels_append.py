"""The append op: every implementation against its definition, its derivative, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from vlcache_jax.kernels.append import append

RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
CASES = [
    ("xla", False, "float32", (16, 64)),
    ("xla", False, "bfloat16", (16, 64)),
    ("pallas_tpu", RACES, "float32", (32, 128)),
    ("pallas_tpu", RACES, "bfloat16", (48, 128)),
    ("pallas_tpu", RACES, "bfloat16", (256, 64)),
    ("pallas_tpu", RACES, "int8", (64, 128)),
]


def arrays(dtype, slots, width, heads=(3, 3, 6)):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.integers(-99, 99, shape).astype("float32")).astype(dtype)

    buffers = tuple(draw(4, n, slots, width) for n in heads)
    return buffers, tuple(draw(4, n, width) for n in heads), jnp.array([0, slots - 1, 7, 17 % slots], jnp.int32)


@pytest.mark.parametrize(("name", "interpret", "dtype", "sizes"), CASES)
def test_every_row_writes_at_its_own_slot_and_nowhere_else(name, interpret, dtype, sizes):
    buffers, new, slots = arrays(dtype, *sizes)
    expected = append(buffers, new, slots, implementation="reference")
    found = append(buffers, new, slots, implementation=name, interpret=interpret)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_reference_by_hand():
    out = append((jnp.zeros((2, 1, 3, 1)),), (jnp.ones((2, 1, 1)),), jnp.array([2, 0]), implementation="reference")[0]
    assert out[:, 0, :, 0].tolist() == [[0, 0, 1], [1, 0, 0]]


def test_derivative_is_that_of_the_definition():
    buffers, new, slots = arrays("float32", 16, 8)

    def loss(name):
        def of(buffers, new):
            out = append(buffers, new, slots, implementation=name)
            return sum((x * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)).sum() for x in out)

        return jax.grad(of, argnums=(0, 1))(buffers, new)

    for mine, theirs in zip(jax.tree.leaves(loss(None)), jax.tree.leaves(loss("reference")), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_what_does_not_fit_is_refused():
    buffers, new, slots = arrays("float32", 16, 8)
    with pytest.raises(ValueError, match="do not fit a buffer"):
        append(buffers, new[::-1], slots)
    with pytest.raises(ValueError, match="do not fit a buffer"):
        append(buffers, new, slots[:3])
    with pytest.raises(NotImplementedError, match="not a multiple of 128"):
        append(buffers, new, slots, implementation="pallas_tpu")


def test_it_works_in_place():
    buffers, new, slots = arrays("float32", 512, 64)
    compiled = jax.jit(append, donate_argnums=0).lower(buffers, new, slots).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in buffers)
    assert memory.temp_size_in_bytes < 0.1 * sum(x.nbytes for x in buffers)
