"""What becomes of the tokens that a layer does not keep."""

import dataclasses

from vlcache_jax.errors import PolicyError
from vlcache_jax.kernels.quantisation import BITS

MERGES = ("averaged", "pivotal", "weighted")


def check_bits(name: str, bits: int | None) -> None:
    """Raises PolicyError unless `bits` can be stored."""
    if type(bits) is not int or bits not in BITS:
        raise PolicyError(f"{name}={bits!r} cannot be stored: use {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}")


@dataclasses.dataclass(frozen=True)
class Drop:
    """They are gone."""


@dataclasses.dataclass(frozen=True)
class Merge:
    """Each is merged into the kept token whose key is most like its own (LOOK-M, arXiv 2406.18139).

    For every KV head an evicted key goes to the kept key with the largest cosine similarity, ties to the lower
    position. With x a kept key, or the value beside it, and y_1 .. y_n those of the tokens that went to it:

        averaged  (x + sum y_i) / (n + 1)
        pivotal   (x + sum (y_i + x) / 2) / (n + 1)
        weighted  (x + sum c_i y_i) / (n + 1),   c_i the cosine of the keys, for values too

    Any kept token takes part, the recent ones and the sinks included; one that nothing went to stays as it is, bit for
    bit. Keys are merged as they are stored, rotated each at its own position, as in the authors' code.

    Attributes:
      kind: "averaged", "pivotal" (the authors' default) or "weighted".

    Raises:
      PolicyError: another kind.
    """

    kind: str = "pivotal"

    def __post_init__(self) -> None:
        if self.kind not in MERGES:
            raise PolicyError(f"Merge({self.kind!r}) is not known: use {', '.join(MERGES)}")


@dataclasses.dataclass(frozen=True)
class Quantise:
    """They stay at fewer bits than the kept ones, in a store of their own (`KVState.more`).

    How many there will be is not known before the prompt is seen, so that store has room for all tokens of all layers.

    Attributes:
      bits: 8, 4 or 2.
    """

    bits: int = 2

    def __post_init__(self) -> None:
        check_bits("Quantise: bits", self.bits)


Evicted = Drop | Merge | Quantise
