"""Self-attention over a whole sequence: prefill, training and vision towers."""

from vlcache_jax.kernels.attention.api import IMPLEMENTATIONS, attention
from vlcache_jax.kernels.attention.mask import CAUSAL, FULL, Mask, places_of

__all__ = ["CAUSAL", "FULL", "IMPLEMENTATIONS", "Mask", "attention", "places_of"]
