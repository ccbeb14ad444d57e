"""A product with a matrix of 8- or 4-bit codes, one of a stack of them, where they lie."""

from vlcache_jax.kernels.quantised_matmul.api import IMPLEMENTATIONS, quantised_matmul

__all__ = ["IMPLEMENTATIONS", "quantised_matmul"]
