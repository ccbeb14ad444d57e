"""Pruning methods in the grid, which all leave the same part of the visual tokens, and two that look at nothing."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.pruning.method import Between, InFront
from vlcache_jax.pruning.methods.aim import AIM
from vlcache_jax.pruning.methods.cd_pruner import CDPruner
from vlcache_jax.pruning.methods.div_prune import DivPrune
from vlcache_jax.pruning.methods.fast_v import FastV
from vlcache_jax.pruning.methods.feather import Feather
from vlcache_jax.pruning.methods.keep_curve import KeepCurve
from vlcache_jax.pruning.methods.pi_to_me import PiToMe
from vlcache_jax.pruning.methods.pyramid_drop import PyramidDrop
from vlcache_jax.pruning.methods.sparse_vlm import SparseVLM
from vlcache_jax.pruning.methods.todre import ToDRE
from vlcache_jax.pruning.methods.vision_zip import VisionZip

_LAYER = 1  # of the demo's six, behind which those drop tokens that look at the decoder


@dataclasses.dataclass(frozen=True)
class Chance(InFront):
    """In front of the decoder floor(keep N) of N visual tokens stay, by chance, or in equal steps."""

    even: bool = False

    def scores(self, cut: int, between: Between) -> jax.Array:
        """See `Pruning.scores`. In equal steps: where the number of those that stay rises."""
        stage = between.stage
        if not self.even:
            return jax.random.uniform(jax.random.key(0), stage.places.shape)
        visual = stage.droppable
        rank, count = jnp.cumsum(visual, axis=1, dtype=jnp.int32), jnp.sum(visual, axis=1, keepdims=True)
        keep = floor_fraction(count, self.keep)
        steps = (rank * keep) // jnp.maximum(count, 1) - ((rank - 1) * keep) // jnp.maximum(count, 1)
        return steps.astype(jnp.float32)


def feather(keep: float) -> Feather:
    """About half of what stays is a grid, as it is at 25 % with the published one of every third row and column."""
    stride = math.ceil(math.sqrt(2 / keep))
    return Feather((_LAYER,), (max(0.0, round(keep - stride**-2, 4)),), stride)


PRUNINGS: dict[str, tuple[str, Callable[[float], Any]]] = {
    "vision_zip": ("VisionZip", VisionZip),
    "div_prune": ("DivPrune", DivPrune),
    "cd_pruner": ("CDPruner", CDPruner),
    "todre": ("ToDRE", ToDRE),
    "pi_to_me": ("PiToMe", PiToMe),
    "aim": ("AIM, merging", lambda keep: AIM(keep, prune=0)),
    "fast_v": ("FastV", lambda keep: FastV(_LAYER, keep)),
    "pyramid_drop": ("PyramidDrop", lambda keep: PyramidDrop((_LAYER,), (keep,))),
    "feather": ("FEATHER", feather),
    "sparse_vlm": ("SparseVLM, nothing recycled", lambda keep: SparseVLM((_LAYER,), (keep,), recycle=0)),
    "keep_curve": ("P-Sigmoid", lambda keep: KeepCurve(budget=keep)),
    "random_tokens": ("Random tokens", Chance),
    "even_tokens": ("Tokens in equal steps", lambda keep: Chance(keep, even=True)),
}
"""By their names: title, and from the part that stays to the method; published options where they do not say it."""
