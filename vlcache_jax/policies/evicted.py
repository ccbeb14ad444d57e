"""What becomes of the tokens that a layer does not keep."""

import dataclasses

from vlcache_jax.errors import PolicyError

MERGES = ("averaged", "pivotal", "weighted")


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


Evicted = Drop | Merge
