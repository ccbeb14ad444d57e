"""SparseVLM (arXiv 2410.04417): the text that matters to the images rates them; some of what goes is recycled."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.cache.selection import indices, largest
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.pruning.attention import row_weighted
from vlcache_jax.pruning.clusters import merged_clusters
from vlcache_jax.pruning.method import Between, Count, Pruning, named
from vlcache_jax.pruning.options import check_part, check_parts
from vlcache_jax.pruning.similarity import put
from vlcache_jax.pruning.stage import Choice, Stage


@named("sparse_vlm")
@dataclasses.dataclass(frozen=True)
class SparseVLM(Pruning):
    """Behind three layers, the visual tokens stay that chosen words of the text attend to most, and means of others.

    The raters are the text tokens t whose mean over visual tokens v of softmax over t of (x_v . x_t) is above the mean
    of all text tokens, x the embeddings in front of the decoder. They stay the same throughout. Behind each of `layers`
    a visual token scores the mean over heads and raters of the attention in the layer that has just run, and the
    floor(keep N) best of the prompt's N stay.

    Of the d that go, the m = floor(recycle d) best are clustered into floor(m / 10) + 1 clusters by density peaks (DPC
    with 5 neighbours, Euclidean distances of hidden states over the root of their size), whose means stay, too.

    Deviates: the mean of a cluster lies at the place of its centre, where the authors' code appends it; distances are
    not disturbed by random numbers to break ties; tokens keep their positions.

    Attributes:
      layers: behind how many layers tokens are dropped; None for 3, 7 and 16 of 32, that is behind the layers with
        numbers 2, 6 and 15.
      keep: which part of the prompt's visual tokens goes on: 300, 200 and 110 of LLaVA-1.5's 576.
      recycle: which part of those that go is clustered.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: numbers that are not in order or out of range.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.1), pruning=vlc.SparseVLM())
    """

    layers: tuple[int, ...] | None = None
    keep: tuple[float, ...] = (0.521, 0.348, 0.191)
    recycle: float = 0.3
    looks_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_parts(self.name, self.layers, self.keep, 3)
        check_part(self.name, recycle=self.recycle)

    @property
    def _parts(self) -> list[float]:
        return [part for part in self.keep if part < 1]

    def cuts(self, layers: int) -> tuple[int, ...]:
        first, second = layers // 16 + 1, max(layers // 16 + 2, 3 * layers // 16 + 1)
        where = self.layers or (first, second, max(second + 1, layers // 2))
        return tuple(layer for layer, part in zip(where, self.keep, strict=True) if part < 1)

    def kept(self, cut: int, visual: Count, left: Count) -> Count:
        best: Any = floor_fraction(visual, self._parts[cut])
        recycled: Any = floor_fraction(left - best, self.recycle)
        return best + recycled // 10 + 1 - 1 // (recycled + 1)

    def choose(self, cut: int, between: Between) -> Choice:
        stage, entered, layer = between.stage, between.entered, between.stage.layers[1] - 1
        part, prompt = self._parts[cut], between.prompt
        raters = raters_of(prompt)
        if stage.index is not None:
            raters = jnp.take_along_axis(raters, stage.index, axis=1) & stage.valid
        query, key, _ = between.project(layer, entered.hidden, entered.positions)
        weight = raters.astype(jnp.float32)
        weight = weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1)
        weights = jnp.broadcast_to(weight[:, None], (len(weight), query.shape[2], stage.room))
        scores = jnp.mean(row_weighted(query, key, weights, stage.lengths), axis=1)
        most = floor_fraction(stage.room, self.recycle)
        if not most:
            return Choice(scores)
        visual = jnp.sum(prompt.droppable, axis=1, dtype=jnp.int32)

        def recycled(scores, droppable, hidden, visual):
            best = droppable & largest(jnp.where(droppable, scores, -jnp.inf), floor_fraction(visual, part)[:, None])
            rest = droppable & ~best
            count = floor_fraction(jnp.sum(rest, axis=1, dtype=jnp.int32), self.recycle)
            some = rest & largest(jnp.where(rest, scores, -jnp.inf), count[:, None])
            index = indices(some, most)
            clusters = jnp.where(count > 0, count // 10 + 1, 0)
            centre, means = merged_clusters(hidden, index, count, clusters, most // 10 + 1)
            ranks = jnp.where(best, 2, 0).astype(jnp.float32)
            return put(ranks[..., None], centre, jnp.ones((*centre.shape, 1), jnp.float32))[..., 0], centre, means

        inputs = scores, stage.droppable, stage.hidden, visual
        ranks, centre, means = by_row(recycled, len(stage.lengths))(*inputs)
        return Choice(ranks, hidden=put(stage.hidden, centre, means))


def raters_of(prompt: Stage) -> jax.Array:
    """bool [batch, room]: the text tokens that rate visual ones; all text where there are none."""
    text, visual = prompt.valid & ~prompt.vision_mask, prompt.droppable
    x = jnp.where(prompt.valid[..., None], prompt.hidden, 0)[:, :, None]
    unscaled: dict[str, Any] = {"temperature": x.shape[-1] ** -0.5, "columns": text}
    total = row_weighted(x, x, visual[:, None].astype(jnp.float32), prompt.lengths, **unscaled)[:, 0]
    count = jnp.sum(text, axis=1, keepdims=True, dtype=jnp.float32)
    chosen = text & (total > jnp.sum(jnp.where(text, total, 0), axis=1, keepdims=True) / jnp.maximum(count, 1))
    return jnp.where(jnp.any(chosen, axis=1, keepdims=True), chosen, text)
