"""Plain XLA."""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.varying import varying

_BLOCK = 256  # channels whose weights, as floats, stay in a CPU's cache


def quantised_matmul(
    x: jax.Array, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, layer: jax.Array
) -> jax.Array:
    """See `api.quantised_matmul`; x is [rows, channels].

    The compilers for TPUs and GPUs make weights from codes inside the product, if the scales multiply there: behind it,
    a product of more than a few rows has a copy of the weights as floats. Of several groups there is one anyway.
    """
    groups, features = scales.shape[1:]
    weights = _at(layer, codes).astype(jnp.float32).reshape(groups, -1, features)
    if zeros is not None:
        weights = weights - _at(layer, zeros)[:, None]
    weights = (weights * _at(layer, scales)[:, None]).reshape(codes.shape[1:]).astype(x.dtype)
    return jnp.matmul(x, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def in_blocks(
    x: jax.Array, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, layer: jax.Array
) -> jax.Array:
    """Some channels at a time: a CPU writes all weights as floats to memory otherwise, for every product."""
    groups, features = scales.shape[1:]
    rows, channels = x.shape
    size = channels // groups
    block = next(n for n in range(min(size, _BLOCK), 0, -1) if size % n == 0)
    x_blocks = x.reshape(rows, channels // block, block).swapaxes(0, 1)

    def add(total: jax.Array, item: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        number, part = item
        start = (layer, number * block, jnp.zeros((), jnp.int32))
        weights = jax.lax.dynamic_slice(codes, start, (1, block, features))[0].astype(x.dtype)
        at = (layer, number * block // size, jnp.zeros((), jnp.int32))
        if zeros is not None:
            weights = weights - jax.lax.dynamic_slice(zeros, at, (1, 1, features))[0].astype(x.dtype)
        product = jnp.matmul(part, weights, preferred_element_type=jnp.float32)
        if groups > 1:
            product = product * jax.lax.dynamic_slice(scales, at, (1, 1, features))[0]
        return total + product, None

    start = varying(jnp.zeros((rows, features), jnp.float32), x, codes)
    numbers = jax.lax.iota(jnp.int32, channels // block)
    total = jax.lax.scan(add, start, (numbers, x_blocks))[0]
    return (total * _at(layer, scales) if groups == 1 else total).astype(x.dtype)


def _at(layer: jax.Array, stack: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
