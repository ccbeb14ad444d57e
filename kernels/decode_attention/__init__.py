"""Attention of one query per row, or a few, over segments of packed stores."""

from vlcache_jax.kernels.decode_attention.api import IMPLEMENTATIONS, decode_attention
from vlcache_jax.kernels.decode_attention.types import Segments, Store
from vlcache_jax.kernels.decode_attention.union import union_attention

__all__ = ["IMPLEMENTATIONS", "Segments", "Store", "decode_attention", "union_attention"]
