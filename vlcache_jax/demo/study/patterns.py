"""Patterns of the prefill in the grid, which list the same part of causal attention's blocks, and one by chance."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from vlcache_jax.patterns.a_shape import AShape
from vlcache_jax.patterns.block_mask import BlockMask
from vlcache_jax.patterns.flex_prefill import FlexPrefill
from vlcache_jax.patterns.mm_inference import MMInference
from vlcache_jax.patterns.pattern import Chosen, Pattern, PatternInputs
from vlcache_jax.patterns.x_attention import XAttention

_BLOCK = 16  # a row of the demo's images
_SMALL = {"block": _BLOCK, "min_tokens": 0}


def near(density: float) -> float:
    """The part of a prompt that each query may look back at for a density: 1 - (1 - part)^2 of the triangle."""
    return 1 - math.sqrt(1 - density)


def _chance(inputs: PatternInputs) -> Chosen:
    shape = len(inputs.lengths), inputs.key.shape[2], inputs.blocks, inputs.blocks
    return Chosen(
        blocks=jnp.ones((1, 1, *shape[2:]), bool),
        rank=jax.random.uniform(jax.random.fold_in(jax.random.key(0), inputs.layer), shape),
    )


def _a_shape(density: float, tokens: int) -> Pattern:
    # The first block is besides; a window reaches into one block more than it holds.
    return AShape(_BLOCK, max(1, round(near(density) * tokens) - 2 * _BLOCK), **_SMALL)


def _mm_inference(density: float, tokens: int) -> Pattern:
    return MMInference(max(1, round(near(density) * tokens) - 2 * _BLOCK), **_SMALL)


def _best(pattern: Callable[..., Pattern], density: float, tokens: int) -> Pattern:
    """The blocks that a pattern would drop last: lists end where the density is reached."""
    del tokens
    return pattern(capacity=near(density), **_SMALL)


PATTERNS: dict[str, tuple[str, Callable[[float, int], Pattern]]] = {
    "x_attention": ("XAttention", partial(_best, partial(XAttention, 1.0, 8))),
    "flex_prefill": ("FlexPrefill, block means", partial(_best, partial(FlexPrefill, 1.0, 0))),
    "a_shape": ("A-shape", _a_shape),
    "mm_inference": ("MMInference", _mm_inference),
    "random_blocks": ("Random blocks", partial(_best, partial(BlockMask, _chance))),
}
"""By their names: title, and from a density and a prompt's padded length to the pattern.

The density is what a pattern without room for more lists, and what one of windows lists for the longest prompt, about;
results hold what was listed.
"""
