"""PyramidDrop (arXiv 2410.17247): visual tokens are dropped in stages, by the attention of the prompt's last token."""

import dataclasses

import jax

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.pruning.attention import of_last_token
from vlcache_jax.pruning.method import Between, Count, Pruning, named
from vlcache_jax.pruning.options import check_parts


@named("pyramid_drop")
@dataclasses.dataclass(frozen=True)
class PyramidDrop(Pruning):
    """Behind some layers, only the visual tokens that the prompt's last token attends to most go on.

    With N visual tokens in a prompt, the rows of a batch keep floor(keep N) of them behind each of the layers, those
    with the largest

        mean over query heads of A[n - 1, j],    A = softmax over all tokens j of q_(n-1) . k_j / sqrt(d)

    where q and k are what the next layer makes of the hidden states. All visual tokens of a prompt are in one ranking.

    Deviates from the authors' code in one point: kept tokens keep their rotary positions, and answers go on where the
    prompt ended. There, tokens are numbered anew after each drop. So keys of earlier layers, later layers and
    answers agree about distances, and what a policy keeps of the cache keeps its meaning.

    Attributes:
      layers: behind how many layers tokens are dropped; None for a quarter, half and three quarters of them (8, 16, 24
        of 32).
      keep: which part of the prompt's visual tokens goes on, behind each of them; it must not rise.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: numbers that are not in order or out of range.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.1), pruning=vlc.PyramidDrop())
    """

    layers: tuple[int, ...] | None = None
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)

    def __post_init__(self) -> None:
        check_parts(self.name, self.layers, self.keep, 3)

    def _parts(self, layers: int) -> list[tuple[int, float]]:
        """(layer, part) of every cut; one that keeps all is none."""
        where = self.layers or tuple(layers * i // 4 for i in (1, 2, 3))
        return [(layer, part) for layer, part in zip(where, self.keep, strict=True) if part < 1]

    def cuts(self, layers: int) -> tuple[int, ...]:
        return tuple(layer for layer, _ in self._parts(layers))

    def kept(self, cut: int, visual: Count, left: Count) -> Count:
        return floor_fraction(visual, [part for part in self.keep if part < 1][cut])

    def scores(self, cut: int, between: Between) -> jax.Array:
        return of_last_token(between.project, between.stage, between.stage.layers[1])
