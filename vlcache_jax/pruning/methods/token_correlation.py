"""After token-level correlation-guided compression (arXiv 2407.14439): crops of documents keep what says something."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.pruning.method import Between, InFront, named
from vlcache_jax.pruning.options import check_part, check_whole
from vlcache_jax.pruning.similarity import each, groups_of, unit
from vlcache_jax.pruning.stage import Choice


@named("token_correlation")
@dataclasses.dataclass(frozen=True)
class TokenCorrelation(InFront):
    """In front of the decoder, each tile keeps as many visual tokens as it has that are not redundant.

    A token is redundant if at least `partners` others of its tile have keys in the tower, averaged over heads, whose
    cosine with its own is above `threshold`. A tile with k tokens that are not redundant keeps the k that the class
    token attends to most, so an empty margin costs little and dense text stays. Both are of the layer of the features.
    At most floor(keep N) of the prompt's N stay, the tiles' first choices before their later ones: shapes are static,
    so `keep` is what the prefill costs, and less is stored where less is said.

    After the paper, not as in it: its code was never published, thresholds and how tokens are drawn are not known, and
    the whole image in front of its tiles is treated as they are.

    Attributes:
      keep: the largest part of the prompt's visual tokens that stays.
      threshold: of the cosine.
      partners: how many make a token redundant.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: numbers out of range. When used: a model that tells nothing of its tower's attention.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, pruning=vlc.TokenCorrelation(keep=0.4))
    """

    keep: float = 0.5
    threshold: float = 0.9
    partners: int = 2
    needs_tower: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part(self.name, threshold=self.threshold)
        check_whole(self.name, 1, partners=self.partners)

    def choose(self, cut: int, between: Between) -> Choice:
        stage, tower = between.stage, between.tower
        assert tower is not None

        def chosen(keys, attention, visual, droppable, groups):
            x, index = unit(keys, visual), jax.lax.iota(jnp.int32, visual.shape[1])[None]
            attention = jnp.where(visual, attention, -jnp.inf)

            def same_tile(number):
                return visual & (groups == jnp.take(groups, number, axis=1)[:, None])

            def redundant(number, cosines):
                like = same_tile(number) & (index != number) & (cosines > self.threshold)
                return jnp.sum(like, axis=1, dtype=jnp.int32) >= self.partners

            plain = visual & ~each(x, x, redundant)

            def ranked(number, _):
                """(the token's rank by attention in its tile, how many the tile keeps)."""
                mine = jnp.take(attention, number, axis=1)[:, None]
                before = (attention > mine) | ((attention == mine) & (index < number))
                same = same_tile(number)
                return jnp.sum(same & before, axis=1, dtype=jnp.int32), jnp.sum(same & plain, axis=1, dtype=jnp.int32)

            rank, tile_keeps = each(x, x, ranked)
            stays = visual & (rank < tile_keeps)
            count = jnp.sum(stays, axis=1, dtype=jnp.int32)
            kept = floor_fraction(jnp.sum(droppable, axis=1, dtype=jnp.int32), self.keep)
            return jnp.where(stays, -rank.astype(jnp.float32), -jnp.inf), jnp.minimum(count, kept)

        visual = stage.droppable & (stage.vision_index >= 0)
        inputs = tower.keys, tower.attention, visual, stage.droppable, groups_of(stage)
        return Choice(*by_row(chosen, len(stage.lengths))(*inputs))
