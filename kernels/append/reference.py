"""The definition."""

import jax
import jax.numpy as jnp


def append(buffers: tuple[jax.Array, ...], new: tuple[jax.Array, ...], slots: jax.Array) -> tuple[jax.Array, ...]:
    """See `api.append`."""

    def one(buffer: jax.Array, x: jax.Array) -> jax.Array:
        here = jnp.arange(buffer.shape[2])[None, None, :, None] == slots[:, None, None, None]
        return jnp.where(here, x[:, :, None], buffer)

    return tuple(one(buffer, x) for buffer, x in zip(buffers, new))
