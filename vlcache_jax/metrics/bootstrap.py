"""How sure a mean is."""

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
    # How often each sample is drawn says as much as the draws themselves, and its product with the values is quick.
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    low, high = np.quantile(weights @ values / n, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high))
