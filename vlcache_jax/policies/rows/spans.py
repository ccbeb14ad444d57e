"""Which rows of the prompt score its keys."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError


class Rows(Protocol):
    """A choice of consecutive prompt rows. Hashable."""

    @property
    def most(self) -> int | None:
        """The largest number of rows there can be, None if it is the prompt's length."""

    def span(self, lengths: jax.Array, vision_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First row and number of rows, i32 [batch] each, from lengths [batch] and vision_mask [batch, length]."""


@dataclasses.dataclass(frozen=True)
class PostVision:
    """The rows after the last visual token (VL-Cache, arXiv 2410.23317, section 3.2).

    A row without images, or whose prompt ends in its image, uses its last min(length, `fallback`) positions.
    """

    fallback: int = 32
    most = None

    def __post_init__(self) -> None:
        if self.fallback < 1:
            raise PolicyError(f"PostVision(fallback={self.fallback}): give at least 1 row")

    def span(self, lengths: jax.Array, vision_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Rows.span`."""
        index = jax.lax.iota(jnp.int32, vision_mask.shape[1])
        first = 1 + jnp.max(jnp.where(vision_mask, index, -1), axis=1)
        usable = (first > 0) & (first < lengths)
        first = jnp.where(usable, first, jnp.maximum(lengths - self.fallback, 0))
        return first.astype(jnp.int32), (lengths - first).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class LastRows:
    """The last `count` rows of the prompt (the paper's speed test uses 50; SnapKV's observation window)."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise PolicyError(f"LastRows({self.count}): give at least 1 row")

    @property
    def most(self) -> int | None:
        """See `Rows.most`."""
        return self.count

    def span(self, lengths: jax.Array, vision_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Rows.span`."""
        count = jnp.minimum(lengths, self.count).astype(jnp.int32)
        return (lengths - count).astype(jnp.int32), count


@dataclasses.dataclass(frozen=True)
class AllRows:
    """Every row of the prompt (accumulated attention, as H2O uses it)."""

    most = None

    def span(self, lengths: jax.Array, vision_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Rows.span`."""
        return jnp.zeros_like(lengths), lengths


@dataclasses.dataclass(frozen=True)
class Repetition:
    """The rows of the prompt's repetition: prefill has each prompt said twice, and these ones say it again.

    A choice of rows asks for that by `repeats = True`; its `span` is then of prompts that are twice as long. The rows
    are of use to scores that are made of `LayerInputs.statistics`; there are none of them in `LayerInputs.query`.
    """

    most = None
    repeats = True

    def span(self, lengths: jax.Array, vision_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Rows.span`."""
        return lengths // 2, lengths // 2


def LastRow() -> LastRows:
    """The last row only."""
    return LastRows(1)
