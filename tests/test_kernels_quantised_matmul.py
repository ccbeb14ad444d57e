"""Products with codes: every implementation against the definition, the derivative in x, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from vlcache_jax.kernels.quantised_matmul import quantised_matmul

RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


def weights(bits=4, channels=256, features=96, groups=2, shifted=False, layers=3):
    rng = np.random.default_rng(0)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (layers, channels, features))
    scales = jnp.asarray(rng.uniform(0.01, 0.02, (layers, groups, features)), jnp.float32)
    zeros = jnp.asarray(rng.integers(-8, 9, scales.shape), jnp.float32) if shifted else None
    return jnp.asarray(codes, jnp.int8).astype(f"int{bits}"), scales, zeros


def queries(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("name", "bits", "groups"), [
    ("xla", 8, 1), ("xla", 4, 2), ("xla_blocks", 8, 1), ("xla_blocks", 4, 2), ("pallas_tpu", 4, 2),
    ("pallas_tpu", 8, 2),
])  # fmt: skip
def test_implementations_agree_with_the_definition(name, bits, groups, shifted):
    matrix = weights(bits, groups=groups, shifted=shifted)
    x = queries(2, 3, 256)
    expected = quantised_matmul(x, *matrix, 1, implementation="reference")
    found = quantised_matmul(x, *matrix, 1, implementation=name, interpret=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_reference_by_hand():
    codes = jnp.array([[[1, 2], [3, 4], [5, 6], [7, -8]]], jnp.int8)
    scales, zeros = jnp.array([[[1.0, 10.0], [2.0, 0.5]]]), jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
    out = quantised_matmul(jnp.eye(4)[:, :], codes, scales, zeros, implementation="reference")
    assert out.tolist() == [[0, 20], [2, 40], [10, 2], [14, -5]]


def test_kernel_in_simulated_memory_with_rows_and_features_that_fill_no_tile():
    matrix, x = weights(4, 1024, 640, 8, True, 2), queries(520, 1024, dtype="bfloat16")
    expected = quantised_matmul(x.astype("float32"), *matrix, 1, implementation="reference")
    found = quantised_matmul(x, *matrix, 1, implementation="pallas_tpu", interpret=RACES)
    np.testing.assert_allclose(found.astype("float32"), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("groups", [1, 2])
def test_derivative_in_x_is_that_of_the_definition(groups):
    matrix, x = weights(4, groups=groups, shifted=True), queries(3, 256)

    def of(name):
        return jax.grad(lambda x: jnp.sin(quantised_matmul(x, *matrix, 2, implementation=name)).sum())(x)

    np.testing.assert_allclose(of(None), of("reference"), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused():
    codes, scales, _ = weights()
    with pytest.raises(ValueError, match="do not fit together"):
        quantised_matmul(queries(1, 128), codes, scales)
    with pytest.raises(ValueError, match="i8 or i4"):
        quantised_matmul(queries(1, 256), codes.astype("int16"), scales)
    with pytest.raises(NotImplementedError, match="one group"):
        quantised_matmul(queries(1, 256), codes, scales[:, :1], implementation="pallas_tpu", interpret=True)
    with pytest.raises(NotImplementedError, match="groups of 64 channels"):
        quantised_matmul(queries(1, 256), codes, scales.repeat(2, 1), implementation="pallas_tpu", interpret=True)
