"""FastV (arXiv 2403.06764): half of the visual tokens go behind the second layer."""

import dataclasses
from typing import Any, ClassVar

import jax

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.pruning.attention import of_last_token
from vlcache_jax.pruning.method import Between, Count, Pruning, named
from vlcache_jax.pruning.options import check_part, check_whole


@named("fast_v")
@dataclasses.dataclass(frozen=True)
class FastV(Pruning):
    """Behind some layers, only the visual tokens go on that the prompt's last token attended to most in the last one.

        mean over query heads of A[n - 1, j],    A = softmax over all tokens j of q_(n-1) . k_j / sqrt(d)

    with q and k of layer `layer - 1`. Of N visual tokens `round(keep N)` stay, halves up.

    Attributes:
      layer: behind how many layers tokens are dropped.
      keep: which part of the prompt's visual tokens goes on.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: numbers out of range.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, pruning=vlc.FastV(keep=0.25))
    """

    layer: int = 2
    keep: float = 0.5
    looks_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_part(self.name, keep=self.keep)
        check_whole(self.name, 1, layer=self.layer)

    def cuts(self, layers: int) -> tuple[int, ...]:
        return (self.layer,) if self.keep < 1 else ()

    def kept(self, cut: int, visual: Count, left: Count) -> Count:
        """See `Pruning.kept`. floor(x + 1/2) = floor(2 x) - floor(x)."""
        count: Any = visual
        return floor_fraction(2 * count, self.keep) - floor_fraction(count, self.keep)

    def scores(self, cut: int, between: Between) -> jax.Array:
        return of_last_token(between.project, between.entered, between.stage.layers[1] - 1)
