"""What becomes of the tokens that a layer does not keep."""

import dataclasses

from vlcache_jax.errors import PolicyError
from vlcache_jax.kernels.quantisation import BITS


def check_bits(name: str, bits: int | None) -> None:
    """Raises PolicyError unless `bits` can be stored."""
    if type(bits) is not int or bits not in BITS:
        raise PolicyError(f"{name}={bits!r} cannot be stored: use {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}")


class Evicted:
    """What becomes of them. Subclasses are frozen dataclasses, so that a policy can be hashed."""


@dataclasses.dataclass(frozen=True)
class Drop(Evicted):
    """They are gone."""


@dataclasses.dataclass(frozen=True)
class Quantise(Evicted):
    """They stay at fewer bits than the kept ones, in a store of their own (`KVState.more`).

    How many there will be is not known before the prompt is seen, so that store has room for all tokens of all layers.

    Attributes:
      bits: 8, 4 or 2.
    """

    bits: int = 2

    def __post_init__(self) -> None:
        check_bits("Quantise: bits", self.bits)
