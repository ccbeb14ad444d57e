"""FEATHER (arXiv 2412.13180): the last token's attention without rotary positions, and a grid of tokens beside it."""

import dataclasses
from typing import ClassVar

import jax

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.pruning.attention import of_last_token
from vlcache_jax.pruning.method import Between, Count, Places, Pruning, named
from vlcache_jax.pruning.options import check_parts, check_whole


@named("feather")
@dataclasses.dataclass(frozen=True)
class Feather(Pruning):
    """Visual tokens are dropped twice, by a criterion that does not favour those near the end of the prompt.

        mean over query heads of A[n - 1, j],    A = softmax over visual tokens j of q_(n-1) . k_j / sqrt(d)

    q and k are what the last layer that ran makes of its input without rotary positions, under which FastV's criterion
    picks what lies at the bottom of images. Behind the first of `layers` stay the `floor(keep N)` best of N visual
    tokens and, for they are few that early criteria miss, every `stride`-th row and column of each tile or image;
    behind the second the `floor(keep N')` best of the N' that are left.

    Attributes:
      layers: behind how many layers tokens are dropped; None for a quarter and half of them (8 and 16 of 32).
      keep: which part of the visual tokens goes on: of the prompt's at the first, of those that are left at each other.
      stride: of the grid that stays at the first; 0 for no grid.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: numbers that are not in order or out of range. When used: a model that does not tell where in a tile
        or image its visual tokens lie, unless `stride` is 0.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.1), pruning=vlc.Feather())
    """

    layers: tuple[int, ...] | None = None
    keep: tuple[float, ...] = (0.3, 0.09)
    stride: int = 3
    looks_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_parts(self.name, self.layers, self.keep, 2)
        check_whole(self.name, 0, stride=self.stride)

    @property
    def _cuts(self) -> list[int]:
        """Which of the fractions drop anything."""
        return [number for number, part in enumerate(self.keep) if part < 1]

    def cuts(self, layers: int) -> tuple[int, ...]:
        where = self.layers or (layers // 4, layers // 2)
        return tuple(where[number] for number in self._cuts)

    def kept(self, cut: int, visual: Count, left: Count) -> Count:
        return floor_fraction(left, self.keep[self._cuts[cut]])

    def protected(self, cut: int, grid: Places) -> Places | None:
        if not self.stride or not self._cuts or self._cuts[cut]:
            return None
        return (grid[:, 1] >= 0) & (grid[:, 1] % self.stride == 0) & (grid[:, 2] % self.stride == 0)

    def scores(self, cut: int, between: Between) -> jax.Array:
        entered = between.entered
        over = entered.droppable
        return of_last_token(between.project, entered, entered.layers[1] - 1, over=over, rotated=False)
