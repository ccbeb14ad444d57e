"""The rotation under which stores of codes hold keys and values.

A few channels of keys are much larger than the others, and a step as wide as those serves the others badly. A rotation
spreads what is in one channel over all (QuaRot, arXiv 2404.00456, with a Hadamard matrix). Queries rotated alike have
the same products with the keys; outputs are linear in the values, and rotated back. Here it is the discrete Hartley
transform, which exists for every head size and is its own inverse:

    R[i, j] = (cos(2 pi i j / d) + sin(2 pi i j / d)) / sqrt(d)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def matrix(size: int) -> np.ndarray:
    """f32 [size, size], symmetric and orthogonal.

    Example:
      >>> bool(np.allclose(matrix(6) @ matrix(6), np.eye(6), atol=1e-6))
      True
    """
    angles = 2 * np.pi * (np.outer(np.arange(size), np.arange(size)) % size) / size
    return ((np.cos(angles) + np.sin(angles)) / np.sqrt(size)).astype(np.float32)


def rotated(x: jax.Array) -> jax.Array:
    """`x` [..., head_dim] times the matrix, in float32, of the dtype of `x`; twice is `x` again."""
    turned = jnp.matmul(x.astype(jnp.float32), matrix(x.shape[-1]), precision="highest")
    return turned.astype(x.dtype)
