"""Stores of 8, 4 or 2 bits: keys scaled per channel, values per token."""

from vlcache_jax.kernels.quantisation.api import (
    BITS,
    dequantise_keys,
    dequantise_values,
    group_size,
    quantise_keys,
    quantise_values,
    scales_width,
)

__all__ = [
    "BITS",
    "dequantise_keys",
    "dequantise_values",
    "group_size",
    "quantise_keys",
    "quantise_values",
    "scales_width",
]
