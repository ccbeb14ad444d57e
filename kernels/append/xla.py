"""One scatter: in place on CPUs and GPUs. On a TPU XLA copies the whole buffer for it."""

import jax
import jax.numpy as jnp


def append(buffers: tuple[jax.Array, ...], new: tuple[jax.Array, ...], slots: jax.Array) -> tuple[jax.Array, ...]:
    """See `api.append`."""
    rows = jax.lax.iota(jnp.int32, slots.shape[0])
    promises = {"unique_indices": True, "indices_are_sorted": True, "mode": "promise_in_bounds"}
    return tuple(buffer.at[rows, :, slots].set(x, **promises) for buffer, x in zip(buffers, new))  # type: ignore[arg-type]
