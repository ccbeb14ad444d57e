"""Attention of one query per row over a segment of a packed store."""

from vlcache_jax.kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
