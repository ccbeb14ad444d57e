"""How answers are drawn: the user's word."""

import dataclasses
import math
import operator
from typing import Any

import jax
import numpy as np

from vlcache_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature, top-k and top-p sampling, applied in that order.

    Attributes:
      temperature: divides the logits; above 0 and finite. (Greedy decoding is `sampling=None`.)
      top_k: keep only the k largest logits (ties with the k-th too).
      top_p: keep only the smallest set of tokens whose probabilities reach p, in (0, 1]; at least one, and ties with
        the last too.

    Raises:
      InputError: a value out of range, or that is no number.

    Example:
      >>> Sampling(temperature=0.7, top_p=0.9)
      Sampling(temperature=0.7, top_k=None, top_p=0.9)
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        temperature = _number("temperature", self.temperature)
        if not temperature > 0:
            raise InputError(f"temperature={self.temperature} must be above 0; for greedy decoding use sampling=None")
        if math.isinf(temperature):
            raise InputError(f"temperature={self.temperature} must be finite: a large number draws all tokens alike")
        object.__setattr__(self, "temperature", temperature)
        if self.top_k is not None:
            top_k = self.top_k
            if isinstance(top_k, bool | np.bool_) or not hasattr(top_k, "__index__"):
                raise InputError(f"top_k={top_k!r} is not an integer: give a number of tokens, or None")
            if operator.index(top_k) < 1:
                raise InputError(f"top_k={top_k} must be at least 1")
            object.__setattr__(self, "top_k", operator.index(top_k))
        if self.top_p is not None:
            top_p = _number("top_p", self.top_p)
            if not 0 < top_p <= 1:
                raise InputError(f"top_p={self.top_p} must lie in (0, 1]")
            object.__setattr__(self, "top_p", top_p)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool | np.bool_ | jax.core.Tracer) or not hasattr(value, "__float__"):
        raise InputError(f"{name}={value!r} is not a number")
    return float(value)
