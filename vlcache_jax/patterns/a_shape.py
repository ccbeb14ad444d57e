"""A-shape (MInference, arXiv 2407.02490; StreamingLLM, arXiv 2309.17453): the first tokens, and the latest ones."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.patterns.pattern import Chosen, Pattern, PatternInputs, named


@named("a_shape")
@dataclasses.dataclass(frozen=True)
class AShape(Pattern):
    """Every query sees the prompt's first tokens and those just before itself.

    Blocks of keys that hold one of the first `sinks` tokens, or one of the last `window` tokens of any query of the
    block, itself included. Whole blocks: a query sees somewhat more than `sinks` and `window`.

    Attributes:
      sinks: first tokens.
      window: latest tokens.
      heads, capacity, min_tokens, dense_layers, block: see `Pattern`.

    Raises:
      PolicyError: a value out of range.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.1), prefill=vlc.AShape(128, 2048))
    """

    sinks: int = 128
    window: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_whole(sinks=0, window=1)

    def most_blocks(self, blocks: int) -> int:
        return min(blocks, -(-self.sinks // self.block) + (self.window + self.block - 2) // self.block + 1)

    def choose(self, inputs: PatternInputs) -> Chosen:
        return Chosen(blocks=a_shape(inputs, self.sinks, self.window)[None, None])


def a_shape(inputs: PatternInputs, sinks: jax.Array | int, window: jax.Array | int) -> jax.Array:
    """bool [..., blocks, blocks] of sinks and windows [..., 1, 1], or plain numbers."""
    shape = (1,) * max(0, jnp.ndim(window) - 2)
    number = jax.lax.iota(jnp.int32, inputs.blocks).reshape(*shape, 1, -1)
    distance = inputs.distance.reshape(*shape, *inputs.distance.shape)
    # The block's first query is at 0, its window begins at 1 - window, and the keys of a block end at block - 1.
    near = distance * inputs.block <= window - 1 + inputs.block - 1
    return (number * inputs.block < sinks) | near
