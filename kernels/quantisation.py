"""Quantising the keys and values of a store.

Asymmetric: `x = code * step + zero`, codes are signed integers of `bits` bits. Keys have outlier channels, so they get
a step and a zero per channel and group of tokens; values get them per token (KIVI, arXiv 2402.02750; ZipCache, arXiv
2405.14256).

Steps and zeros are bfloat16, half the bytes of float32, and kept as its bits in int16, since CPUs convert whole arrays
of bfloat16 before they slice them. A zero is rounded first, the step then widened so that the range about it still
holds every number, and codes are made with what is stored: all that is lost is a little of a step's width.

A group is one TPU tile of bytes, 32 rows: 32, 64 or 128 tokens of 8, 4 or 2 bits. A byte holds 8 / bits tokens of the
same channel that lie 32 tokens apart, the first in the low bits, so that whole tiles unpack by shifts:

    byte row r of a group (4 bits):   | token 32 + r | token r |
"""

import jax
import jax.numpy as jnp

BITS = (8, 4, 2)
SCALE_DTYPE = jnp.int16  # the bits of bfloat16
_ROWS = 32  # of a TPU tile of bytes
_LANES = 128  # of a TPU tile


def group_size(bits: int) -> int:
    """Tokens of a group, and so the alignment of segments in a quantised store: 32 * 8 / bits.

    Raises:
      ValueError: `bits` is not 8, 4 or 2.
    """
    if bits not in BITS:
        raise ValueError(f"bits {bits!r} is not one of {BITS}")
    return _ROWS * 8 // bits


def scales_width(head_dim: int) -> int:
    """Numbers in a row of the keys' scales: head_dim rounded up to a multiple of 128."""
    return -(-head_dim // _LANES) * _LANES


def quantise_keys(keys: jax.Array, bits: int, valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Quantises keys per channel and group of tokens.

    Args:
      keys: [..., slots, head_dim], slots a multiple of `group_size(bits)`.
      bits: 8, 4 or 2.
      valid: bool [..., slots]. Slots without it do not widen the range, whatever they hold; their codes are 0.

    Returns:
      codes: i8 [..., slots * bits / 8, head_dim].
      scales: i16 [..., slots / group, 2, width], the step and the zero. width is head_dim rounded up to 128: TPUs keep
        such rows in order whatever their number, so that a kernel can read those of a segment; the rest is 0.

    Raises:
      ValueError: unsupported bits or number of slots.
    """
    group = group_size(bits)
    _check(keys, group)
    *batch, slots, head_dim = keys.shape
    x = keys.astype(jnp.float32).reshape(*batch, slots // group, group, head_dim)
    mask = None if valid is None else valid.reshape(*batch, slots // group, group, 1)
    codes, step, zero = _quantise(x, bits, -2, mask)
    scales = jnp.concatenate([step, zero], axis=-2)
    scales = jnp.pad(scales, [(0, 0)] * (scales.ndim - 1) + [(0, scales_width(head_dim) - head_dim)])
    return _pack(codes.reshape(keys.shape), bits), bits_of_scales(scales)


def quantise_values(values: jax.Array, bits: int, valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Quantises values per token.

    Args:
      values: [..., slots, head_dim], slots a multiple of `group_size(bits)`.
      bits: 8, 4 or 2.
      valid: bool [..., slots]. Slots without it get codes, steps and zeros of 0, whatever they hold.

    Returns:
      codes: i8 [..., slots * bits / 8, head_dim].
      scales: i16 [..., 2, slots], the step and the zero.

    Raises:
      ValueError: unsupported bits or number of slots.
    """
    _check(values, group_size(bits))
    codes, step, zero = _quantise(values.astype(jnp.float32), bits, -1, None if valid is None else valid[..., None])
    return _pack(codes, bits), bits_of_scales(jnp.stack([step[..., 0], zero[..., 0]], axis=-2))


def dequantise_keys(codes: jax.Array, scales: jax.Array, bits: int) -> jax.Array:
    """Keys f32 [..., slots, head_dim] from what `quantise_keys` returned for the same `bits`."""
    x = _unpack(codes, bits)
    x = x.reshape(*scales.shape[:-2], group_size(bits), codes.shape[-1])
    scales = scales_of_bits(scales[..., : codes.shape[-1]])
    x = x * scales[..., :1, :] + scales[..., 1:, :]
    return x.reshape(*codes.shape[:-2], -1, codes.shape[-1])


def dequantise_values(codes: jax.Array, scales: jax.Array, bits: int) -> jax.Array:
    """Values f32 [..., slots, head_dim] from what `quantise_values` returned for the same `bits`."""
    step, zero = (scales_of_bits(scales[..., i, :, None]) for i in (0, 1))
    return _unpack(codes, bits) * step + zero


def bits_of_scales(scales: jax.Array) -> jax.Array:
    """i16 from bf16."""
    return jax.lax.bitcast_convert_type(scales, SCALE_DTYPE)


def scales_of_bits(bits: jax.Array) -> jax.Array:
    """f32 from what `bits_of_scales` made, in operations that every backend and kernel has."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.int32) << 16, jnp.float32)


def _check(x: jax.Array, group: int) -> None:
    if x.shape[-2] % group:
        raise ValueError(f"{x.shape[-2]} slots are not a multiple of the group of {group} tokens")


def _quantise(x: jax.Array, bits: int, axis: int, valid: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes i32 like `x`, step and zero (bfloat16) with `axis` reduced to 1."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low = jnp.min(x, axis, keepdims=True, initial=jnp.inf, where=valid)
    high = jnp.max(x, axis, keepdims=True, initial=-jnp.inf, where=valid)
    low, high = (jnp.where(high < low, 0, end) for end in (low, high))  # nothing valid
    stored_zero = (low - (high - low) / (highest - lowest) * lowest).astype(jnp.bfloat16)
    zero = stored_zero.astype(jnp.float32)
    stored_step = _at_least(jnp.maximum((high - zero) / highest, (low - zero) / lowest))
    step = stored_step.astype(jnp.float32)
    codes = jnp.clip(jnp.round((x - zero) / jnp.where(step == 0, 1, step)), lowest, highest)
    if valid is not None:
        codes = jnp.where(valid, codes, 0)
    return codes.astype(jnp.int32), stored_step, stored_zero


def _at_least(x: jax.Array) -> jax.Array:
    """The next bfloat16 that is not below x, f32 and not negative; or the one after it."""
    near = x.astype(jnp.bfloat16)
    above = (near.astype(jnp.float32) * (1 + 2.0**-7)).astype(jnp.bfloat16)
    return jnp.where(near.astype(jnp.float32) < x, above, near)


def _pack(codes: jax.Array, bits: int) -> jax.Array:
    """i32 [..., slots, head_dim] to i8 [..., slots * bits / 8, head_dim]."""
    *batch, slots, head_dim = codes.shape
    per_byte = 8 // bits
    parts = codes.reshape(*batch, slots // (per_byte * _ROWS), per_byte, _ROWS, head_dim)
    packed = sum((parts[..., i, :, :] & (2**bits - 1)) << (bits * i) for i in range(per_byte))
    return ((packed ^ 128) - 128).astype(jnp.int8).reshape(*batch, -1, head_dim)  # the top bit is the sign


def _unpack(codes: jax.Array, bits: int) -> jax.Array:
    """i8 [..., slots * bits / 8, head_dim] to f32 [..., slots, head_dim]."""
    *batch, rows, head_dim = codes.shape
    x = codes.astype(jnp.int32).reshape(*batch, rows // _ROWS, 1, _ROWS, head_dim)
    left = 32 - bits * jnp.arange(1, 8 // bits + 1, dtype=jnp.int32)[:, None, None]
    x = (x << jnp.expand_dims(left, range(x.ndim - 3))) >> (
        32 - bits
    )  # the part's top bit becomes the sign, and is shifted in
    return x.reshape(*batch, -1, head_dim).astype(jnp.float32)
