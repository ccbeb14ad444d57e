"""Merging partial attentions over disjoint sets of keys."""

from vlcache_jax.kernels.merge.api import merge

__all__ = ["merge"]
