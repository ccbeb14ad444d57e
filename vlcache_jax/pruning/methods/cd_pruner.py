"""CDPruner (arXiv 2506.10967): visual tokens that differ from one another, and matter to the question."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.errors import PolicyError
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.pruning.method import Between, InFront, named
from vlcache_jax.pruning.options import check_part
from vlcache_jax.pruning.similarity import at, dots, unit
from vlcache_jax.pruning.stage import Stage


@named("cd_pruner")
@dataclasses.dataclass(frozen=True)
class CDPruner(InFront):
    """In front of the decoder, the visual tokens stay that a determinantal point process holds most probable.

    With S the cosines of the embeddings of visual tokens, and r how relevant each is to the question, floor(keep N) of
    N tokens are chosen that make the determinant of their part of K large, greedily, one after another:

        K_ij = r_i S_ij r_j,    r = (s - min s + 1e-6) / (max s - min s),    s_i = mean over t of cos(x_i, e_t)

    where e_t are the embeddings of the text behind the last visual token (of all text, if none follows). That is how
    OpenVINO GenAI has it; the authors' s comes of CLIP's text encoder, which checkpoints of these models do not hold.
    The question plays a part, so this is not for contexts that are asked many.

    Attributes:
      keep: which part of the prompt's visual tokens stays.
      relevance: what part relevance plays, below 1: r becomes exp(a r), a = relevance / (2 (1 - relevance)); 0 for none
        at all. None, as in the authors' code, takes r as it is.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: numbers out of range.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, pruning=vlc.CDPruner(keep=0.1))
    """

    relevance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relevance is not None:
            check_part(self.name, relevance=self.relevance)
            if self.relevance == 1:
                raise PolicyError(
                    f"{self.name}(relevance=1): give less than 1, at which nothing but relevance would count"
                )

    def scores(self, cut: int, between: Between) -> jax.Array:
        stage, most = between.stage, floor_fraction(between.stage.room, self.keep)

        def chosen(stage: Stage) -> jax.Array:
            visual = stage.droppable
            x = unit(stage.hidden, visual)
            return determinantal_order(x, self._weights(stage, x), visual, most)

        plain = dataclasses.replace(stage, layer_inputs=None)
        return by_row(chosen, len(stage.lengths))(plain)

    def _weights(self, stage: Stage, x: jax.Array) -> jax.Array:
        visual, text = stage.droppable, question(stage)
        text_mean = jnp.sum(unit(stage.hidden, text), axis=1, keepdims=True)
        text_mean = text_mean / jnp.maximum(jnp.sum(text, axis=1, dtype=jnp.float32), 1)[:, None, None]
        s = dots(x, text_mean)[..., 0]
        low = jnp.min(jnp.where(visual, s, jnp.inf), axis=1, keepdims=True)
        span = jnp.max(jnp.where(visual, s, -jnp.inf), axis=1, keepdims=True) - low
        r = jnp.where(span > 0, (s - low + 1e-6) / jnp.where(span > 0, span, 1), 1)
        if self.relevance is None:
            return jnp.where(visual, r, 0)
        a = self.relevance / (2 * (1 - self.relevance))
        return jnp.where(visual, jnp.exp(a * r), 0)


def question(stage: Stage) -> jax.Array:
    """bool [batch, room]: text behind the last visual token; all text where none follows."""
    index = jax.lax.iota(jnp.int32, stage.room)[None]
    last = jnp.max(jnp.where(stage.vision_mask & stage.valid, index, -1), axis=1, keepdims=True)
    text = stage.valid & ~stage.vision_mask
    behind = text & (index > last)
    return jnp.where(jnp.any(behind, axis=1, keepdims=True), behind, text)


def determinantal_order(x: jax.Array, weight: jax.Array, candidate: jax.Array, most: int) -> jax.Array:
    """Scores that fall in the order in which a greedy search maximises the determinant of K = w_i x_i . x_j w_j.

    K is never made: a step makes one row of it and of its Cholesky factor (Chen et al., arXiv 1709.05135). What is left
    of a token's diagonal when it is as good as nothing (a part of 1e-5) is rounding, and takes nothing from the others.

    Args:
      x: f32 [batch, n, d], weight f32 [batch, n], candidate bool [batch, n].
      most: how many are chosen (static).

    Returns:
      f32 [batch, n]: minus the step at which a token was chosen; -inf for those that were not.
    """
    batch, n, _ = x.shape
    x = x * weight[..., None]
    whole = jnp.sum(x * x, axis=-1)
    diagonal, index = jnp.where(candidate, whole, -jnp.inf), jax.lax.iota(jnp.int32, n)[None]

    def step(number: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rows, diagonal, scores = state
        best = jnp.argmax(diagonal, axis=1).astype(jnp.int32)[:, None]
        rest = at(diagonal, best)
        mine = jnp.take_along_axis(rows, best[:, None], axis=2)  # [batch, most, 1]
        row = dots(at(x, best), x)[:, 0] - jnp.einsum("bkn,bkm->bm", mine, rows, precision="highest")
        counts = candidate & (rest > 1e-5 * at(whole, best))
        row = jnp.where(counts, row * jax.lax.rsqrt(jnp.where(rest > 0, rest, 1)), 0)
        picked = (index == best) & (rest > -jnp.inf)
        scores = jnp.where(picked, -number.astype(jnp.float32), scores)
        diagonal = jnp.where(picked, -jnp.inf, diagonal - row * row)
        return rows.at[:, number].set(row), diagonal, scores

    rows, unchosen = jnp.zeros((batch, most, n), jnp.float32), jnp.full(diagonal.shape, -jnp.inf, jnp.float32)
    start = varying((rows, diagonal, unchosen), x)
    return jax.lax.fori_loop(0, most, step, start)[2]
