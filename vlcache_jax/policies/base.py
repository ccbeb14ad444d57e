"""A cache policy: which part of the prompt's KV cache is kept, composed of small parts."""

import dataclasses

from vlcache_jax.errors import PolicyError
from vlcache_jax.fractions import as_fraction
from vlcache_jax.policies.allocate import Allocate, Uniform
from vlcache_jax.policies.rows import PostVision, Rows
from vlcache_jax.policies.scores import AccumulatedAttention, Score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Frozen and hashable: a static argument of the compiled programs.

    After the prefill each layer has a score for every token and KV head; `allocate` gives the layer its slots; the
    most recent floor(recent * slots) tokens, and always the last one, are kept, and the rest of the slots go to the
    best scores, ties to the lower position. Free of padding: it never scores, is never kept, never counts.

    Attributes:
      name: for reports.
      budget: fraction of the prompt's full cache to keep, in [0.0001, 1]. At 1 nothing is scored and all is kept.
      rows: which prompt rows score the keys.
      score: from the rows' attention (or anything else in a layer) to a score.
      allocate: slots per layer.
      recent: fraction of a layer's slots for its most recent tokens, in [0, 1].
      candidate_fraction: below 1, each layer of the prefill hands on only this fraction of its tokens, the best ones,
        so that the full cache of all layers never exists at once. The result is the same unless a layer's slots exceed
        its candidates; then the layer keeps all candidates, and the report says `exact=False`.
    """

    name: str
    budget: float
    rows: Rows = dataclasses.field(default_factory=PostVision)
    score: Score = dataclasses.field(default_factory=AccumulatedAttention)
    allocate: Allocate = dataclasses.field(default_factory=Uniform)
    recent: float = 0.1
    candidate_fraction: float = 1.0

    def __post_init__(self) -> None:
        for name, low in (("budget", 1e-4), ("recent", 0.0), ("candidate_fraction", 1e-4)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 1:
                span = f"[{low:g}, 1]" if low == 0 else "(0, 1], and not below 0.0001"
                raise PolicyError(f"{name}={value!r} is out of range: give a fraction in {span}")
        if not self.keeps_all and as_fraction(self.candidate_fraction) < as_fraction(self.budget):
            raise PolicyError(
                f"candidate_fraction={self.candidate_fraction} is below budget={self.budget}: the layers together "
                "could not hand on enough tokens; raise candidate_fraction (2 to 4 times the budget is a good start)"
            )

    @property
    def keeps_all(self) -> bool:
        """Whether this is the uncompressed cache."""
        return self.budget == 1
