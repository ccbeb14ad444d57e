"""Numbers that are equal but for rounding, which must not decide anything: it differs from one batch to another."""

import jax
import jax.numpy as jnp

ROUNDING = 2.0**-19
"""Relative distance below which neighbouring values are equal: some 30 times the rounding of a rotation in float32."""


def without_rounding(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Values that differ by rounding only, made equal: each is the smallest that is reached from it without a gap.

    Args:
      values: f32 [..., entries], not negative.
      valid: bool, like `values`: the others are left alone and bridge no gap.

    Returns:
      f32, like `values`.

    Example:
      >>> values = jnp.array([1.0000001, 2.0, 1.0, 1.1])
      >>> without_rounding(values, values > 0).tolist()
      [1.0, 2.0, 1.0, 1.100000023841858]
    """
    index = jnp.broadcast_to(jax.lax.iota(jnp.int32, values.shape[-1]), values.shape)
    ordered, index = jax.lax.sort((jnp.where(valid, values, jnp.inf), index), num_keys=1)
    gap = ordered[..., 1:] - ordered[..., :-1] > ROUNDING * ordered[..., 1:]
    starts = jnp.concatenate([ordered[..., :1], jnp.where(gap, ordered[..., 1:], -jnp.inf)], axis=-1)
    start = jax.lax.cummax(starts, axis=values.ndim - 1)
    equal = jnp.take_along_axis(start, jnp.argsort(index, axis=-1), axis=-1)
    return jnp.where(valid & jnp.isfinite(values), equal, values)
