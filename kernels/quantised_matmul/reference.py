"""The definition."""

import jax
import jax.numpy as jnp


def quantised_matmul(
    x: jax.Array, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, layer: jax.Array
) -> jax.Array:
    """See `api.quantised_matmul`; x is [rows, channels]."""
    weights = codes[layer].astype(jnp.float32)
    size = codes.shape[1] // scales.shape[1]
    if zeros is not None:
        weights = weights - jnp.repeat(zeros[layer], size, axis=0)
    weights = weights * jnp.repeat(scales[layer], size, axis=0)
    return jnp.matmul(x.astype(jnp.float32), weights, precision="highest").astype(x.dtype)
