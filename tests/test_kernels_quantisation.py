"""Quantised stores: half a step of error, the packing spelled out, and slots that must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlcache_jax.kernels import quantisation

BITS = (8, 4, 2)
quantise = {
    "keys": (quantisation.quantise_keys, quantisation.dequantise_keys),
    "values": (quantisation.quantise_values, quantisation.dequantise_values),
}


def store(seed=0, slots=256, head_dim=16):
    """Channels of very different sizes and offsets, as keys have."""
    rng = np.random.default_rng(seed)
    channel = np.exp(rng.normal(size=(2, 3, 1, head_dim)))
    x = rng.normal(size=(2, 3, slots, head_dim)) * channel + 3 * rng.normal(size=(2, 3, 1, head_dim))
    return jnp.asarray(x, jnp.float32)


def by_groups(x, kind, bits):
    """f64, the numbers that share a step along the last axis."""
    x = np.asarray(x, np.float64)
    if kind == "values":
        return x
    return x.reshape(*x.shape[:-2], -1, quantisation.group_size(bits), x.shape[-1]).swapaxes(-1, -2)


def steps_of(scales, kind):
    """f64, one for each row of `by_groups`: as stored."""
    scales = np.asarray(scales).view(jnp.bfloat16).astype(np.float64)
    return scales[..., 0, :16] if kind == "keys" else scales[..., 0, :]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_error_is_at_most_half_a_step(kind, bits):
    forward, back = quantise[kind]
    x = store()
    codes, scales = jax.jit(forward, static_argnums=1)(x, bits)
    assert codes.dtype == jnp.int8
    assert codes.shape == (2, 3, 256 * bits // 8, 16)
    assert scales.dtype == jnp.int16
    grouped = by_groups(x, kind, bits)
    step = steps_of(scales, kind)
    narrowest = (grouped.max(-1) - grouped.min(-1)) / (2**bits - 1)
    offset = np.abs(grouped).max(-1) * 2.0**-8 / (2 ** (bits - 1) - 1)  # what rounding the zero may add to a step
    assert np.all((narrowest * 0.999 <= step) & (step <= (narrowest + offset) * 1.02 + 1e-6))
    error = np.abs(by_groups(back(codes, scales, bits), kind, bits) - grouped).max(-1)
    assert np.all(error <= 0.5 * step + 1e-5)
    assert error.max() > 0.3 * step.max()  # and the range is used, not a wider one


@pytest.mark.parametrize("bits", BITS)
def test_packing(bits):
    """Token t of a group lies in byte row t % 32, part t // 32, the lowest part in the lowest bits."""
    group = quantisation.group_size(bits)
    rng = np.random.default_rng(1)
    wanted = rng.integers(0, 2**bits, (2 * group, 4))
    for g in range(2):  # the whole range in every group and channel, so that the codes are known
        wanted[g * group], wanted[g * group + 1] = 0, 2**bits - 1
    codes, scales = quantisation.quantise_keys(jnp.asarray(wanted, jnp.float32), bits)
    scales = np.asarray(scales).view(jnp.bfloat16).astype(np.float32)
    np.testing.assert_allclose(scales[:, 0, :4], 1, rtol=1e-6)
    np.testing.assert_allclose(scales[:, 1, :4], 2 ** (bits - 1), rtol=1e-6)
    bytes_ = np.asarray(codes).view(np.uint8)
    for token in range(2 * group):
        row = token // group * 32 + token % 32
        part = bytes_[row] >> (bits * (token % group // 32)) & (2**bits - 1)
        signed = wanted[token] - 2 ** (bits - 1)
        np.testing.assert_array_equal(part, signed % 2**bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_invalid_slots_never_matter(kind, bits):
    forward, back = quantise[kind]
    x = store()
    valid = np.arange(256) < 130  # whole invalid groups and, for the smaller groups, part of one
    valid = jnp.broadcast_to(valid, x.shape[:-1])
    clean = forward(jnp.where(valid[..., None], x, 0), bits, valid)
    dirty = forward(jnp.where(valid[..., None], x, jnp.nan), bits, valid)
    for a, b in zip(clean, dirty):
        np.testing.assert_array_equal(a, b)
    restored = np.asarray(back(*dirty, bits))
    assert np.all(np.isfinite(restored))
    grouped = by_groups(np.where(valid[..., None], x, np.nan), kind, bits)
    step = steps_of(dirty[1], kind)
    error = np.where(np.isnan(grouped), 0, np.abs(by_groups(restored, kind, bits) - grouped)).max(-1)
    assert np.all(error <= 0.5 * np.maximum(step, 0) + 1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_constant_channels_and_tokens_are_exact(bits):
    x = jnp.broadcast_to(jnp.arange(8, dtype=jnp.float32) - 3.5, (256, 8))
    np.testing.assert_array_equal(quantisation.dequantise_keys(*quantisation.quantise_keys(x, bits), bits), x)
    y = jnp.broadcast_to(jnp.arange(256, dtype=jnp.float32)[:, None], (256, 8))
    np.testing.assert_array_equal(quantisation.dequantise_values(*quantisation.quantise_values(y, bits), bits), y)


def test_errors():
    with pytest.raises(ValueError, match="bits 3 is not one of"):
        quantisation.group_size(3)
    for forward, _ in quantise.values():
        with pytest.raises(ValueError, match="96 slots are not a multiple of the group of 64"):
            forward(jnp.zeros((96, 4)), 4)
