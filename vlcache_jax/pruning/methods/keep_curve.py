"""Curves of how many visual tokens each layer keeps (arXiv 2412.00556): given, a sigmoid, or searched."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.errors import PolicyError
from vlcache_jax.pruning.attention import of_last_token
from vlcache_jax.pruning.method import Between, Count, Pruning, named
from vlcache_jax.pruning.options import check_part, check_parts


@named("keep_curve")
@dataclasses.dataclass(frozen=True)
class KeepCurve(Pruning):
    """Every layer keeps its own part of the visual tokens, and never more than the one before.

    Attention to visual tokens ranks them alike in all layers but the first, so what matters is how many stay, layer by
    layer. In front of each layer whose part is smaller stay the floor(keep N) of the prompt's N that the last token
    attended to most, averaged over heads, in the layer before.

    The curve is `keep`, one part for each layer, such as `search_keep_curve` finds; or, as the paper's P-Sigmoid,

        keep(l) = 1 / (1 + exp(slope (l / L - middle)))        in layer l of L

    rounded to multiples of 1 / `levels`, with the `middle` at which the mean over layers is `budget`. The first layer
    keeps all. The paper's own parameters are not known here.

    Attributes:
      keep: a part for each layer, 1 for the first; None for the sigmoid.
      budget: mean part of the sigmoid.
      slope: how steep the sigmoid is; 0 is level.
      levels: each change of the part is a stage of its own, which takes time to compile: at most this many.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: parts that rise or are out of range; when used, as many of them as the model has no layers.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, pruning=vlc.KeepCurve(budget=0.3))
    """

    keep: tuple[float, ...] | None = None
    budget: float = 0.5
    slope: float = 12.0
    levels: int = 4
    looks_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_part(self.name, budget=self.budget)
        if self.keep is not None:
            check_parts(self.name, None, self.keep, len(self.keep))
            if self.keep[0] != 1:
                raise PolicyError(f"KeepCurve(keep={self.keep}): the first layer sees all, give 1 for it")
        if not 0 <= self.slope <= 1000 or self.levels < 1:
            raise PolicyError(f"KeepCurve(slope={self.slope}, levels={self.levels}): give 0 to 1000, and 1 or more")

    def of_model(self, layers: int) -> "KeepCurve":
        if self.keep is None:
            return dataclasses.replace(self, keep=sigmoid_curve(layers, self.budget, self.slope, self.levels))
        if len(self.keep) != layers:
            raise PolicyError(f"KeepCurve has {len(self.keep)} parts, the model {layers} layers: give one for each")
        return self

    @property
    def _falls(self) -> list[int]:
        """The layers in front of which tokens are dropped."""
        assert self.keep is not None
        return [layer for layer in range(1, len(self.keep)) if self.keep[layer] < self.keep[layer - 1]]

    def cuts(self, layers: int) -> tuple[int, ...]:
        return tuple(self._falls)

    def kept(self, cut: int, visual: Count, left: Count) -> Count:
        assert self.keep is not None
        return floor_fraction(visual, self.keep[self._falls[cut]])

    def scores(self, cut: int, between: Between) -> jax.Array:
        return of_last_token(between.project, between.entered, between.stage.layers[1] - 1)


def sigmoid_curve(layers: int, budget: float, slope: float, levels: int) -> tuple[float, ...]:
    """The parts of `KeepCurve`'s sigmoid for a model of `layers` layers, whose mean is as near `budget` as may be.

    Example:
      >>> sigmoid_curve(8, 0.5, 30.0, 4)
      (1.0, 1.0, 1.0, 0.75, 0.25, 0.0, 0.0, 0.0)
    """

    def curve(middle: float) -> tuple[float, ...]:
        def part(layer: int) -> float:
            power = min(700.0, slope * (layer / layers - middle))
            return round(levels / (1 + math.exp(power))) / levels

        return (1.0, *map(part, range(1, layers)))

    low, high = -10.0, 10.0  # of the middle; the mean rises with it
    for _ in range(60):
        low, high = (
            ((low + high) / 2, high) if sum(curve((low + high) / 2)) < budget * layers else (low, (low + high) / 2)
        )
    return min(curve(low), curve(high), key=lambda parts: abs(sum(parts) - budget * layers))


def search_keep_curve(
    metric: Callable[[tuple[float, ...]], float], layers: int, parts: Sequence[float], tolerance: float = 0.0
) -> tuple[float, ...]:
    """G-Search: layer by layer from the first on, the smallest part that a metric bears.

    The curve of a layer is the least of `parts` not above the one before with which, all later layers at the same part,
    the metric is at least that of the whole prompt minus `tolerance`; found by bisection, as parts that are smaller do
    not do better.

    Args:
      metric: of a curve, such as the score of `evaluate` under `KeepCurve(keep=curve)` on samples of yours.
      layers: of the model.
      parts: to choose from, in any order.
      tolerance: what may be lost.

    Returns:
      The parts of all layers, for `KeepCurve(keep=...)`; 1 for the first.

    Example:
      >>> search_keep_curve(lambda curve: min(1.0, sum(curve) / 2.5), 4, [1, 0.5, 0.25])
      (1.0, 0.5, 0.5, 0.5)
    """
    wanted, found = metric((1.0,) * layers) - tolerance, [1.0]
    choices = sorted({float(part) for part in parts if part < 1})
    for layer in range(1, layers):
        below = [part for part in choices if part < found[-1]] + [found[-1]]
        low, high = 0, len(below) - 1  # the last one does
        while low < high:
            middle = (low + high) // 2
            curve = (*found, *(below[middle],) * (layers - layer))
            low, high = (low, middle) if metric(curve) >= wanted else (middle + 1, high)
        found.append(below[high])
    return tuple(found)
