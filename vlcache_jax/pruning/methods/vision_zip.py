"""VisionZip (arXiv 2412.04467): the tokens that the vision tower looks at, and means of the others."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.cache.selection import indices, largest
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.pruning.method import Between, InFront, named
from vlcache_jax.pruning.options import check_part
from vlcache_jax.pruning.similarity import at, dots, put, unit
from vlcache_jax.pruning.stage import Choice


@named("vision_zip")
@dataclasses.dataclass(frozen=True)
class VisionZip(InFront):
    """In front of the decoder, dominant visual tokens stay as they are, and some more that the others are merged into.

    Of N visual tokens of a prompt k = floor(keep N) stay. D = k - C are dominant: those that the class token of the
    vision tower attends to most in the layer of the features, summed over heads. The n others, in the order of the
    prompt, have C = floor(contextual k) targets, every max(1, floor(n / C))-th of them from the first on. Each of the
    rest goes to the target with which the cosine of their keys in that layer, averaged over heads, is largest, and what
    the projector is given for a target is

        f_target + mean of f of those that went to it

    The question plays no part, so a context that is asked many questions loses nothing of it by this method.

    Deviates from the authors' code in three points. All images and tiles of a prompt are in one ranking. The class
    token itself, which the model was not trained on, does not stay: there is one more dominant patch instead. Tokens
    keep their places and positions, a target its own. Towers without a class token (SigLIP) use the attention that a
    patch gets of all patches.

    Attributes:
      keep: which part of the prompt's visual tokens stays.
      contextual: which part of them are targets; 10 of 64 and 30 of 192 in the paper.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: numbers out of range. When used: a model that tells nothing of its tower's attention.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.1), pruning=vlc.VisionZip(keep=0.25))
    """

    contextual: float = 0.16
    needs_tower: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part(self.name, contextual=self.contextual)

    def choose(self, cut: int, between: Between) -> Choice:
        stage, tower, project = between.stage, between.tower, between.project_features
        assert tower is not None
        assert project is not None
        most = max(1, floor_fraction(floor_fraction(stage.room, self.keep), self.contextual))

        def merged(attention, keys, features, droppable, has_feature):
            """(scores, index of the targets [batch, most], which are some, features of the targets)."""
            kept = floor_fraction(jnp.sum(droppable, axis=1, dtype=jnp.int32), self.keep)
            targets = floor_fraction(kept, self.contextual)
            attention = jnp.where(has_feature, attention, 0)  # of a row break
            dominant = largest(jnp.where(droppable, attention, -jnp.inf), (kept - targets)[:, None]) & droppable
            rest = droppable & ~dominant & has_feature
            rank = jnp.cumsum(rest, axis=1, dtype=jnp.int32) - 1
            step = jnp.maximum(1, (rank[:, -1] + 1) // jnp.maximum(targets, 1))[:, None]
            is_target = rest & (rank % step == 0) & (rank // step < targets[:, None])
            index = indices(is_target, most)
            real, index = index < stage.room, jnp.minimum(index, stage.room - 1)
            unit_keys = unit(keys, rest)
            cosine = jnp.where(real[:, None], dots(unit_keys, at(unit_keys, index)), -jnp.inf)
            goes = (rest & ~is_target)[..., None] & jax.nn.one_hot(jnp.argmax(cosine, axis=-1), most, dtype=bool)
            f = jnp.where(droppable[..., None], features.astype(jnp.float32), 0)
            total = jnp.einsum("bnm,bnd->bmd", goes.astype(jnp.float32), f, precision="highest")
            count = jnp.sum(goes, axis=1, dtype=jnp.float32)
            new = at(f, index) + total / jnp.maximum(count, 1)[..., None]
            scores = jnp.where(dominant, 2, jnp.where(is_target, 1, 0)).astype(jnp.float32)
            return scores, jnp.where(real, index, stage.room), new.astype(features.dtype)

        inputs = tower.attention, tower.keys, tower.features, stage.droppable, stage.vision_index >= 0
        scores, index, new = by_row(merged, len(stage.lengths))(*inputs)
        return Choice(scores, hidden=put(stage.hidden, index, project(new)))
