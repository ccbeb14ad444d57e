"""How the budget is shared among layers."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from vlcache_jax.budgets import layer_budgets, total_slots
from vlcache_jax.errors import PolicyError


class Allocate(Protocol):
    """A hashable rule."""

    @property
    def threshold(self) -> float | None:
        """Relative threshold of the density it needs, or None if it needs none."""

    def capacity(self, layers: int, length: int, budget: float) -> int:
        """The most slots that all layers together can get, for prompts of up to `length` tokens (static)."""

    def slots(self, density: jax.Array, lengths: jax.Array, budget: float) -> jax.Array:
        """i32 [batch, layers] slots from density f32 [batch, layers] and true lengths i32 [batch]."""


@dataclasses.dataclass(frozen=True)
class SparsityAware:
    """In proportion to the density of each layer's attention (VL-Cache, Algorithm 1); see `layer_budgets`."""

    threshold: float = 0.01
    total: str = "exact"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise PolicyError(f"threshold={self.threshold} is out of range: it must lie in (0, 1]")
        if self.total not in ("exact", "paper"):
            raise PolicyError(f"total={self.total!r} is not known: use 'exact' or 'paper'")

    def capacity(self, layers: int, length: int, budget: float) -> int:
        """See `Allocate.capacity`."""
        if self.total == "exact":
            return int(total_slots(layers, length, budget))
        return min(layers * length, math.floor((budget + 0.01) * layers * length) + layers)

    def slots(self, density: jax.Array, lengths: jax.Array, budget: float) -> jax.Array:
        """See `Allocate.slots`."""
        return jax.vmap(lambda d, n: layer_budgets(d, n, budget, self.total))(density, lengths)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The same for every layer, up to one slot: the exact total, remainders to the lower layers.

    Example:
      >>> Uniform().slots(jnp.ones((1, 4)), jnp.array([10]), 0.29).tolist()
      [[3, 3, 3, 2]]
    """

    @property
    def threshold(self) -> float | None:
        """None: no density is needed."""
        return None

    def capacity(self, layers: int, length: int, budget: float) -> int:
        """See `Allocate.capacity`."""
        return int(total_slots(layers, length, budget))

    def slots(self, density: jax.Array, lengths: jax.Array, budget: float) -> jax.Array:
        """See `Allocate.slots`."""
        layers = density.shape[1]
        total = jnp.asarray(total_slots(layers, lengths, budget))[:, None]
        return total // layers + (jnp.arange(layers) < total % layers)
