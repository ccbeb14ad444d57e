"""PiToMe (arXiv 2405.16148): visual tokens of large clusters are merged, those that stand alone are not."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.errors import PolicyError
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.pruning.method import Between, InFront, named
from vlcache_jax.pruning.options import check_part
from vlcache_jax.pruning.similarity import each, groups_of, nearest, sums_at, unit
from vlcache_jax.pruning.stage import Choice


@named("pi_to_me")
@dataclasses.dataclass(frozen=True)
class PiToMe(InFront):
    """In front of the decoder, floor(keep N) of N visual tokens are left by merging those with the most energy.

    The energy of a token is high where many are like it. In a round, with the cosines S of the embeddings,

        E_i = mean over j of elu(S_ij - margin)         j of the same tile or frame, i included

    With n tokens of which k are to stay, r = min(n - k, floor(n / 2)) go. Of the 2 r of the largest energy, in its
    order, every first one goes to the one of every second with the largest cosine, in its own tile or frame if there is
    one; what remains is the mean of all tokens that it is made of. Rounds follow until k are left: halves need one.

    Deviates: the authors merge within the vision tower, a few tokens in every layer; here it is done in front of the
    decoder, at once, for that leaves the tower and its positions alone. Their margin falls from 0.9 to 0 with depth.

    Attributes:
      keep: which part of the prompt's visual tokens is left, above 0.
      margin: of the energy.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: numbers out of range.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, pruning=vlc.PiToMe(keep=0.5))
    """

    keep: float = 0.5
    margin: float = 0.45

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part(self.name, margin=self.margin)
        if not self.keep:
            raise PolicyError("PiToMe(keep=0): give more than 0, nothing is left to merge into")

    def choose(self, cut: int, between: Between) -> Choice:
        stage = between.stage

        def run(hidden: jax.Array, alive: jax.Array, groups: jax.Array) -> tuple[jax.Array, jax.Array]:
            keep = floor_fraction(jnp.sum(alive, axis=1, dtype=jnp.int32), self.keep)

            def goes_on(state: tuple[jax.Array, ...]) -> jax.Array:
                return jnp.any(jnp.sum(state[1], axis=1, dtype=jnp.int32) > jnp.maximum(keep, 1))

            def merge(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                x, alive, size = state
                count = jnp.sum(alive, axis=1, dtype=jnp.int32)
                goes = jnp.clip(count - keep, 0, count // 2)[:, None]
                like = unit(x, alive)
                energy = jnp.where(alive, self._energy(like, alive, groups), -jnp.inf)
                rank = jnp.argsort(jnp.argsort(-energy, axis=1, stable=True), axis=1).astype(jnp.int32)
                merges = alive & (rank < 2 * goes)
                source, target = merges & (rank % 2 == 0), merges & (rank % 2 == 1)
                best, _ = nearest(like, target, groups=groups)
                weighted = jnp.concatenate([x * size[..., None], size[..., None]], axis=-1)
                sums, came = sums_at(weighted, best, source, stage.room)
                total = size + sums[..., -1]
                merged = (x * size[..., None] + sums[..., :-1]) / total[..., None]
                return jnp.where((came > 0)[..., None], merged, x), alive & ~source, total

            one = varying(jnp.ones(alive.shape, jnp.float32), hidden)
            start: tuple[jax.Array, ...] = hidden.astype(jnp.float32), alive, one
            x, alive, _ = jax.lax.while_loop(goes_on, merge, start)
            return alive.astype(jnp.float32), x.astype(hidden.dtype)

        scores, hidden = by_row(run, len(stage.lengths))(stage.hidden, stage.droppable, groups_of(stage))
        return Choice(scores, hidden=hidden)

    def _energy(self, x: jax.Array, alive: jax.Array, groups: jax.Array) -> jax.Array:
        def of_one(number: jax.Array, cosines: jax.Array) -> jax.Array:
            same = alive & (groups == jnp.take(groups, number, axis=1)[:, None])
            energy = jax.nn.elu(cosines - self.margin)
            count = jnp.sum(same, axis=1, dtype=jnp.float32)
            return jnp.sum(jnp.where(same, energy, 0), axis=1) / jnp.maximum(count, 1)

        return each(x, x, of_one)
