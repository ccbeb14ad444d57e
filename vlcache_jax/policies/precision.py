"""Precisions of stores, as policies name them."""

from vlcache_jax.errors import PolicyError
from vlcache_jax.kernels.precision import PRECISIONS


def check_bits(name: str, bits: int | str | None) -> None:
    """Raises PolicyError unless `bits` can be stored."""
    if type(bits) not in (int, str) or bits not in PRECISIONS:
        *others, last = map(str, PRECISIONS)
        raise PolicyError(f"{name}={bits!r} cannot be stored: use {', '.join(others)} or {last}")
