"""How sure a mean is."""

import functools
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and the bounds between which it lies with the given confidence."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: np.ndarray, *, confidence: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """The mean of independent samples, with a percentile bootstrap interval (Efron, 1979).

    For a comparison of two systems on the same samples pass the differences: such a paired interval is far narrower
    than that of either mean, as most samples are answered alike by both.

    Args:
      values: f [n], one for each sample.
      confidence: of the interval.
      draws: samples with replacement that are drawn.
      seed: of the draws; the same for everything that is compared.

    Raises:
      ValueError: no values, or some that are not finite.

    Example:
      >>> bootstrap_interval(np.array([0.0, 0.0, 0.0]))
      Interval(mean=0.0, low=0.0, high=0.0)
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.all(np.isfinite(values)):
        raise ValueError(f"an interval needs a list of finite values, not {values!r}")
    n = len(values)
    if np.all(values == values[0]):
        return Interval(*[float(values[0])] * 3)
    means = _weights(n, draws, seed) @ values
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high))


@functools.lru_cache(maxsize=2)
def _weights(n: int, draws: int, seed: int) -> np.ndarray:
    """The share of each sample in each draw, f64 [draws, n]: the same for everything that is compared."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n
