"""Precisions of stores, as policies name them."""

from vlcache_jax.errors import PolicyError
from vlcache_jax.kernels.quantisation import BITS


def check_bits(name: str, bits: int | None) -> None:
    """Raises PolicyError unless `bits` can be stored."""
    if type(bits) is not int or bits not in BITS:
        raise PolicyError(f"{name}={bits!r} cannot be stored: use {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}")
