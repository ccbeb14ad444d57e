"""DivPrune (arXiv 2503.02175): visual tokens as far from one another as can be."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.pruning.greedy import greedy_order
from vlcache_jax.pruning.method import Between, InFront, named
from vlcache_jax.pruning.similarity import nearest, unit


@named("div_prune")
@dataclasses.dataclass(frozen=True)
class DivPrune(InFront):
    """In front of the decoder, floor(keep N) of N visual tokens stay whose least distance from one another is large.

    The distance of two is 1 - cosine of their embeddings. The first is the one whose nearest other token is farthest;
    then, each time, the one whose nearest chosen token is farthest. The question plays no part.

    Written from the paper: the authors' code may not be used commercially, and none of it is here.

    Attributes:
      keep: which part of the prompt's visual tokens stays; 0.098 in the paper.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: a number out of range.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, pruning=vlc.DivPrune(keep=0.1))
    """

    def scores(self, cut: int, between: Between) -> jax.Array:
        stage = between.stage

        def chosen(hidden: jax.Array, visual: jax.Array) -> jax.Array:
            x = unit(hidden, visual)
            _, cosine = nearest(x, visual, itself=False)

            def update(number: jax.Array, values: jax.Array, cosines: jax.Array) -> jax.Array:
                return jnp.minimum(jnp.where(number == 0, jnp.inf, values), 1 - cosines)

            return greedy_order(x, visual, 1 - cosine, update, floor_fraction(stage.room, self.keep))

        return by_row(chosen, len(stage.lengths))(stage.hidden, stage.droppable)
