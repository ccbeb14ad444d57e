"""AIM (arXiv 2412.03248): visual tokens are merged in front of the decoder, and dropped by PageRank within it."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.cache.selection import largest
from vlcache_jax.errors import PolicyError
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.pruning.attention import row_weighted
from vlcache_jax.pruning.method import Between, Count, Pruning, named
from vlcache_jax.pruning.options import check_part, check_whole
from vlcache_jax.pruning.similarity import groups_of, nearest, sums_at, unit
from vlcache_jax.pruning.stage import Choice

_TEMPERATURE, _ITERATIONS = 0.1, 5


@named("aim")
@dataclasses.dataclass(frozen=True)
class AIM(Pruning):
    """In front of the decoder similar visual tokens are merged; from half of its layers on they become fewer and fewer.

    Merging leaves k = floor(keep N) of N tokens, in rounds. In a round the tokens, in the order of the prompt, are by
    turns a source and a destination. Each source finds the destination with the largest cosine of their embeddings, in
    its own tile or frame if there is one; of n tokens the r = min(n - k, floor(n / 2)) sources with the largest cosines
    go, and a destination becomes the mean of itself and those that came.

    In front of layer l, from `first` to `last`, stay floor(k (1 - (l - first + 1) / (last - first + 1))) tokens, which
    in the end are none: those with the largest

        sqrt(mean over heads of x_5[j] ** 2),    x_(i+1) = x_i M,    x_0 = 1 / n,    M = softmax(causal logits / 0.1)

    Deviates: M is of the layer that the tokens do not enter any more; the authors' code masks them within it. Between
    rounds the order is that of the prompt.

    Attributes:
      keep: which part of the prompt's visual tokens is left by merging; 1 merges none.
      first, last: layers between which tokens are dropped; None for half and three quarters of them (14, 21 of 28).
      prune: 1, or 0 to merge only.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: numbers out of range.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, pruning=vlc.AIM())
    """

    keep: float = 0.25
    first: int | None = None
    last: int | None = None
    prune: int = 1

    def __post_init__(self) -> None:
        check_part(self.name, keep=self.keep)
        if not self.keep:
            raise PolicyError("AIM(keep=0): give more than 0, nothing is left to merge into")
        check_whole(self.name, 0, **{name: x for name in ("first", "last") if (x := getattr(self, name)) is not None})
        if self.prune not in (0, 1):
            raise PolicyError(f"AIM(prune={self.prune}): give 1 or 0")
        if self.first is not None and self.last is not None and self.first > self.last:
            raise PolicyError(f"AIM(first={self.first}, last={self.last}): give a last layer behind the first")

    def of_model(self, layers: int) -> "AIM":
        first = layers // 2 if self.first is None else self.first
        return dataclasses.replace(
            self, first=first, last=max(first, 3 * layers // 4) if self.last is None else self.last
        )

    def cuts(self, layers: int) -> tuple[int, ...]:
        assert self.first is not None
        assert self.last is not None
        return ((0,) if self.keep < 1 else ()) + (tuple(range(self.first, self.last + 1)) if self.prune else ())

    def kept(self, cut: int, visual: Count, left: Count) -> Count:
        merged = floor_fraction(visual, self.keep)
        if self.keep < 1:
            if cut == 0:
                return merged
            cut -= 1
        assert self.first is not None
        assert self.last is not None
        return floor_fraction(merged, 1 - (cut + 1) / (self.last - self.first + 1))

    def choose(self, cut: int, between: Between) -> Choice:
        if self.keep < 1 and cut == 0:
            return self._merged(between)
        stage = between.stage
        query, key, _ = between.project(stage.layers[1], stage.hidden, stage.positions)
        uniform = 1 / stage.lengths.astype(jnp.float32)
        x = jnp.broadcast_to(uniform[:, None, None], (len(uniform), query.shape[2], stage.room))
        for _ in range(_ITERATIONS):
            x = row_weighted(query, key, x, stage.lengths, temperature=_TEMPERATURE)
        return Choice(jnp.sqrt(jnp.mean(x * x, axis=1)))

    def _merged(self, between: Between) -> Choice:
        stage = between.stage

        def run(hidden: jax.Array, alive: jax.Array, groups: jax.Array) -> tuple[jax.Array, jax.Array]:
            keep = floor_fraction(jnp.sum(alive, axis=1, dtype=jnp.int32), self.keep)

            def goes_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
                return jnp.any(jnp.sum(state[1], axis=1, dtype=jnp.int32) > jnp.maximum(keep, 1))

            def merge(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                x, alive = state
                count = jnp.sum(alive, axis=1, dtype=jnp.int32)
                odd = (jnp.cumsum(alive, axis=1, dtype=jnp.int32) - 1) % 2 == 1
                best, cosine = nearest(unit(x, alive), alive & odd, groups=groups)
                source, goes = alive & ~odd, jnp.clip(count - keep, 0, count // 2)[:, None]
                goes = source & largest(jnp.where(source, cosine, -jnp.inf), goes)
                sums, came = sums_at(x, best, goes, stage.room)
                return jnp.where((came > 0)[..., None], (x + sums) / (1 + came)[..., None], x), alive & ~goes

            x, alive = jax.lax.while_loop(goes_on, merge, (hidden.astype(jnp.float32), alive))
            return alive.astype(jnp.float32), x.astype(hidden.dtype)

        scores, hidden = by_row(run, len(stage.lengths))(stage.hidden, stage.droppable, groups_of(stage))
        return Choice(scores, hidden=hidden)
