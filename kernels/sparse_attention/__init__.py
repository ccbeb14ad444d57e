"""Causal attention of every block of queries with the blocks of keys that a list names, and with no others."""

from vlcache_jax.kernels.sparse_attention.api import IMPLEMENTATIONS, sparse_attention
from vlcache_jax.kernels.sparse_attention.types import Lists, Order

__all__ = ["IMPLEMENTATIONS", "Lists", "Order", "sparse_attention"]
