"""The latest tokens that a layer keeps whatever they score: in the user's words, and as numbers."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.errors import PolicyError, is_number, is_whole
from vlcache_jax.policies.budget import Tokens

Count = TypeVar("Count", bound=int | jax.Array)


@dataclasses.dataclass(frozen=True)
class Window:
    """As `Policy.recent`: the latest `count` tokens, unless they would take more than half of the slots.

    With C slots in a layer on average, which depends on the budget and the prompt's length alone, the window has

        min(count, max(C - count, C // 10))

    tokens in every layer and head: `count` of them from C = 2 count on. Below, the best scores get `count` slots first
    and the window has what is left, but a tenth of the slots in any case: the part that VL-Cache's comparison
    (arXiv 2410.23317, section 5) and EffiVLM-Bench give to the window of every method.

    Raises:
      PolicyError: a count below 1.

    Example:
      >>> [Window(32).of(slots) for slots in (27, 40, 64, 256)]
      [2, 8, 32, 32]
    """

    count: int

    def __post_init__(self) -> None:
        if not is_whole(self.count, 1):
            raise PolicyError(f"Window({self.count!r}): give a whole number of tokens, at least 1")

    def of(self, slots: Count) -> Count:
        """Tokens of the window where a layer has so many slots on average; int in, int out."""
        count, tenth = self.count, slots // 10
        if isinstance(slots, int):
            return min(count, max(slots - count, tenth))  # type: ignore[return-value]
        return jnp.minimum(count, jnp.maximum(slots - count, tenth))  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class AverageShare:
    """As `Policy.recent`: a fraction of the average layer's slots, the same number of tokens in every layer.

    (A plain fraction is one of a layer's own slots.)

    Example:
      >>> AverageShare(0.1).of(57)
      5
    """

    fraction: float

    def __post_init__(self) -> None:
        value = self.fraction
        if not is_number(value, 0, 1):
            raise PolicyError(f"AverageShare({value!r}) is out of range: give a fraction in [0, 1]")

    def of(self, slots: Count) -> Count:
        """See `Window.of`."""
        return floor_fraction(slots, self.fraction)


Recent = float | Tokens | Window | AverageShare


def settled(recent: Recent, slots: jax.Array) -> float | jax.Array:
    """What `recent` means for prompts whose layers get `slots` slots on average.

    Args:
      recent: as in `Policy`.
      slots: i32 [batch].

    Returns:
      A fraction of a layer's own slots, or a window of i32 [batch] tokens.
    """
    if isinstance(recent, Tokens):
        return jnp.full_like(slots, recent.count)
    return recent.of(slots) if isinstance(recent, Window | AverageShare) else recent


def forced(slots: Count, recent: Recent | jax.Array, sinks: int = 0) -> tuple[Count, Count]:
    """How many of a layer's slots go to the latest and to the first tokens of the prompt, whatever they score.

    latest = max(1, min(window, slots - sinks)) and first = min(sinks, slots - 1), where the window is floor(recent *
    slots) tokens, or a number of them: the last token comes first, then the sinks, then the window. Neither
    number, nor what they leave to the others, ever falls when a slot is added.

    Args:
      slots: of the layer, at least 1; an int or an i32 array [batch, ...].
      recent: as in `Policy`, or as `settled` for the batch. What is not settled takes `slots` for the average.
      sinks: first tokens of the prompt.

    Returns:
      (latest, first), like `slots`.

    Example:
      >>> forced(100, 0.1, sinks=4), forced(5, Tokens(32), sinks=4), forced(2, 0.1, sinks=4)
      ((10, 4), (1, 4), (1, 1))
    """
    window: int | jax.Array
    if isinstance(recent, Window | AverageShare):
        window = recent.of(slots)
    elif isinstance(recent, Tokens):
        window = recent.count
    elif isinstance(recent, int | float):
        window = floor_fraction(slots, recent)
    else:
        window = recent.reshape(recent.shape + (1,) * (jnp.ndim(slots) - recent.ndim))
    if isinstance(slots, int):
        return max(1, min(window, slots - sinks)), min(sinks, slots - 1)  # type: ignore[return-value]
    latest = jnp.maximum(1, jnp.minimum(window, slots - sinks))
    return latest, jnp.minimum(sinks, slots - 1)  # type: ignore[return-value]
