"""Tri-shape (SCBench, arXiv 2412.10319): A-shape, and the last rows dense."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.patterns.a_shape import AShape
from vlcache_jax.patterns.pattern import Chosen, PatternInputs, named


@named("tri_shape")
@dataclasses.dataclass(frozen=True)
class TriShape(AShape):
    """`AShape`, but the prompt's last rows, its question mostly, see everything before them.

    Attributes:
      sinks, window: as of `AShape`.
      last: rows that are dense, by whole blocks.
      heads, capacity, min_tokens, dense_layers, block: see `Pattern`.

    Raises:
      PolicyError: a value out of range.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.1), prefill=vlc.TriShape(128, 2048))
    """

    last: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_whole(last=0)

    def most_blocks(self, blocks: int) -> int:
        """See `Pattern.most_blocks`: dense rows see all."""
        return blocks

    def choose(self, inputs: PatternInputs) -> Chosen:
        plain = super().choose(inputs).blocks
        return Chosen(blocks=plain | dense_rows(inputs, inputs.lengths - self.last))


def dense_rows(inputs: PatternInputs, first: jax.Array) -> jax.Array:
    """bool [batch, 1, blocks, 1]: blocks of queries that hold a row from `first` i32 [batch] on."""
    end = (jax.lax.iota(jnp.int32, inputs.blocks) + 1) * inputs.block
    return (end[None] > first[:, None])[:, None, :, None]
