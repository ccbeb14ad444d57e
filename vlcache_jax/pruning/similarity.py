"""Cosines of tokens, in float32, and orders of choice."""

import jax
import jax.numpy as jnp

from vlcache_jax.parallel.mesh import by_row


def unit(x: jax.Array, where: jax.Array) -> jax.Array:
    """Vectors [batch, n, d] of length 1 in float32; zeros where bool [batch, n] is False, and of zeros."""
    x = jnp.where(where[..., None], x.astype(jnp.float32), 0)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def dots(x: jax.Array, y: jax.Array) -> jax.Array:
    """Products of x f32 [batch, m, d] with y [batch, n, d]: [batch, m, n], without rounding of the operands."""
    return jnp.einsum("bmd,bnd->bmn", x, y, precision="highest")


def at(x: jax.Array, index: jax.Array) -> jax.Array:
    """[batch, n, ...] at i32 [batch, m]: [batch, m, ...]."""
    return jnp.take_along_axis(x, jnp.expand_dims(index, range(2, x.ndim)), axis=1)


def put(x: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """[batch, n, d] with `new` [batch, m, d] at i32 [batch, m], which no two of a row share; beyond the end nothing."""

    def of_rows(x: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
        rows = jax.lax.iota(jnp.int32, len(index))[:, None]
        return x.at[rows, index].set(new.astype(x.dtype), mode="drop")

    return by_row(of_rows, len(x))(x, index, new)
