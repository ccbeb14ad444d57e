"""ToDRE (arXiv 2505.18757): diverse visual tokens in front of the decoder, and none once text and images have met."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.pruning.attention import row_weighted
from vlcache_jax.pruning.greedy import greedy_order
from vlcache_jax.pruning.method import Between, Count, Pruning, named
from vlcache_jax.pruning.options import check_part
from vlcache_jax.pruning.similarity import unit
from vlcache_jax.pruning.stage import Choice


@named("todre")
@dataclasses.dataclass(frozen=True)
class ToDRE(Pruning):
    """In front of the decoder floor(keep N) of N visual tokens stay; behind 7/8 of the layers perhaps none.

    The first is the one that the tower's class token attends to most, in the layer of the features; then, each time,
    the one whose cosines with those chosen, of the embeddings, have the least sum.

    Behind 7/8 of the layers, all visual tokens go in a row where text hardly looks at images any more, nor images at
    text: where in the next layer the mean share of attention that text behind the first visual token pays to visual
    tokens, and that visual tokens pay to text, are both below `late`. The paper's threshold is not known here.
    Shapes are static, so this saves nothing unless `late` is 1, which drops them whatever the shares are.

    Deviates: all images of a prompt are one set. Towers without a class token use the attention that a patch gets of
    all patches.

    Attributes:
      keep: which part of the prompt's visual tokens stays; 0.1 in the paper.
      late: the threshold of the second step, above 0; None leaves it out.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: numbers out of range. When used: a model that tells nothing of its tower's attention.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, pruning=vlc.ToDRE(keep=0.1))
    """

    keep: float = 0.25
    late: float | None = None
    needs_tower: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_part(self.name, keep=self.keep)
        if self.late is not None:
            check_part(self.name, late=self.late)

    def cuts(self, layers: int) -> tuple[int, ...]:
        return ((0,) if self.keep < 1 else ()) + ((7 * layers // 8,) if self.late is not None else ())

    def kept(self, cut: int, visual: Count, left: Count) -> Count:
        if cut == 0 and self.keep < 1:
            return floor_fraction(visual, self.keep)
        count: Any = left
        return count if self.late is not None and self.late < 1 else 0 * count

    def choose(self, cut: int, between: Between) -> Choice:
        if cut or self.keep == 1:
            return self._late(between)
        stage, tower = between.stage, between.tower
        assert tower is not None

        def chosen(hidden: jax.Array, visual: jax.Array, attention: jax.Array) -> jax.Array:
            def update(number: jax.Array, values: jax.Array, cosines: jax.Array) -> jax.Array:
                return jnp.where(number == 0, 0.0, values) - cosines

            return greedy_order(unit(hidden, visual), visual, attention, update, floor_fraction(stage.room, self.keep))

        attention = jnp.where(stage.vision_index >= 0, tower.attention, 0)
        return Choice(by_row(chosen, len(stage.lengths))(stage.hidden, stage.droppable, attention))

    def _late(self, between: Between) -> Choice:
        stage = between.stage
        assert self.late is not None
        left = jnp.sum(stage.droppable, axis=1, dtype=jnp.int32)
        if self.late == 1:
            return Choice(jnp.zeros(stage.droppable.shape, jnp.float32), 0 * left)
        query, key, _ = between.project(stage.layers[1], stage.hidden, stage.positions)
        visual = stage.vision_mask & stage.valid
        text = stage.valid & ~visual
        behind = text & (jnp.cumsum(visual, axis=1, dtype=jnp.int32) > 0)

        def share(rows: jax.Array, columns: jax.Array) -> jax.Array:
            weight = rows.astype(jnp.float32)
            weight = weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1)
            weights = jnp.broadcast_to(weight[:, None], (len(rows), query.shape[2], rows.shape[1]))
            found = jnp.mean(row_weighted(query, key, weights, stage.lengths), axis=1)
            return jnp.sum(jnp.where(columns, found, 0), axis=1)

        gone = (share(behind, visual) < self.late) & (share(visual, text) < self.late)
        return Choice(jnp.zeros(stage.droppable.shape, jnp.float32), jnp.where(gone, 0, left))
