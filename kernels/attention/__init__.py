"""Causal self-attention over a whole prompt: prefill and training."""

from vlcache_jax.kernels.attention.api import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
