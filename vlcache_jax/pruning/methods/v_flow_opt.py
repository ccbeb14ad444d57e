"""VFlowOpt (arXiv 2508.05211, ICCV 2025): attention and entropy choose, what goes is recycled, options are searched."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.cache.selection import indices, largest
from vlcache_jax.errors import PolicyError, is_number
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.pruning.attention import of_last_token
from vlcache_jax.pruning.method import Between, Count, Pruning, named
from vlcache_jax.pruning.options import check_part, check_whole
from vlcache_jax.pruning.similarity import put, sums_at
from vlcache_jax.pruning.stage import Choice

_LAYERS = 28  # of the authors' model, whose layers 9 and 18 are the later cuts


@named("v_flow_opt")
@dataclasses.dataclass(frozen=True)
class VFlowOpt(Pruning):
    """In three steps visual tokens become fewer; those that go are averaged into a few that stay.

    In front of the decoder a visual token's importance is

        a_j + entropy softmax_j(e_j)

    with a the attention in the tower's last used layer (of its class token, or of all patches), normalised to sum to 1
    over the row, and e_j the entropy in bits of the 256 grey levels of its patch. Behind layers 9 and 18 of 28 it is
    the last token's attention in the next layer, averaged over heads.

    Of a prompt's N visual tokens k = floor(part N) stay: the k - m most important, and m = min(`merge`, k // 2) that
    are means of the others. These are cut into m runs of equal length in the order of the prompt; the first token of a
    run becomes its mean. The three parts are `first`, first * `second`, and what is left so that the mean over layers
    is `keep`.

    `search_v_flow` finds the options on prompts of one's own, by the paper's objective. Defaults are the middle of the
    paper's ranges.

    After the paper: it prunes within the tower, at its layer 25, here in front of the decoder; how exactly tokens are
    recycled, and one of its options, are not known here.

    Attributes:
      keep: which part of the visual tokens stays, averaged over layers.
      first: the part in front of the decoder; 0.25 to 0.375 in the paper.
      second: which part of those goes on behind the second cut; 0.533 to 1 in the paper.
      entropy: its weight; -1 to 1 in the paper.
      merge: recycled tokens of a step; 3 to 24 in the paper.
      layers: of the model; filled in when it is used.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: numbers out of range, or parts that cannot have that mean. When used: a model that tells nothing of
        its tower.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, pruning=vlc.VFlowOpt(keep=0.25))
    """

    keep: float = 0.25
    first: float | None = None
    second: float = 0.75
    entropy: float = 0.5
    merge: int = 12
    layers: int | None = None
    needs_tower: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = {} if self.first is None else {"first": self.first}
        check_part(self.name, keep=self.keep, second=self.second, **given)
        check_whole(self.name, 0, merge=self.merge)
        if not is_number(self.entropy, -1e3, 1e3):
            raise PolicyError(f"VFlowOpt(entropy={self.entropy}): give a number from -1000 to 1000")
        if self.keep < 1:
            _ = self.parts

    @property
    def parts(self) -> tuple[float, ...]:
        """The parts of the three steps, in a model of 28 layers where none is known."""
        layers = self.layers or _LAYERS
        cuts = self.cuts(layers)
        first = min(1.0, 1.25 * self.keep) if self.first is None else self.first
        second = first * self.second
        sizes = [end - start for start, end in zip(cuts, (*cuts[1:], layers))]
        third = (self.keep * layers - first * sizes[0] - second * sizes[1]) / sizes[2]
        if not 0 <= third <= second + 1e-9:
            raise PolicyError(
                f"VFlowOpt(keep={self.keep}, first={self.first}, second={self.second}): layers behind the last cut "
                f"would keep {third:.3f} of the visual tokens, between 0 and {second:.3f}: change first or second"
            )
        return tuple(round(part, 6) for part in (first, second, min(third, second)))

    def cuts(self, layers: int) -> tuple[int, ...]:
        if self.keep == 1:
            return ()
        second = max(1, round(9 * layers / _LAYERS))
        return 0, second, max(second + 1, round(18 * layers / _LAYERS))

    def of_model(self, layers: int) -> "VFlowOpt":
        return dataclasses.replace(self, layers=layers)

    def kept(self, cut: int, visual: Count, left: Count) -> Count:
        return floor_fraction(visual, self.parts[cut])

    def choose(self, cut: int, between: Between) -> Choice:
        stage, tower = between.stage, between.tower
        if cut:
            importance = of_last_token(between.project, stage, stage.layers[1])
        else:
            assert tower is not None
            importance = _importance(tower.attention, tower.entropy, stage.vision_index >= 0, self.entropy)
        visual = jnp.sum(between.prompt.droppable, axis=1, dtype=jnp.int32)
        part = self.parts[cut]
        most = min(self.merge, stage.room)

        def recycled(importance: jax.Array, droppable: jax.Array, hidden: jax.Array, visual: jax.Array) -> Any:
            kept = jnp.minimum(floor_fraction(visual, part), jnp.sum(droppable, axis=1, dtype=jnp.int32))
            runs = jnp.minimum(most, kept // 2)
            best = droppable & largest(jnp.where(droppable, importance, -jnp.inf), (kept - runs)[:, None])
            rest = droppable & ~best
            count = jnp.maximum(jnp.sum(rest, axis=1, keepdims=True, dtype=jnp.int32), 1)
            rank = jnp.cumsum(rest, axis=1, dtype=jnp.int32) - 1
            run = rank * runs[:, None] // count
            begins = rest & ((rank == 0) | (run != (rank - 1) * runs[:, None] // count)) & (runs > 0)[:, None]
            sums, sizes = sums_at(hidden.astype(jnp.float32), jnp.maximum(run, 0), rest, most)
            means = sums / jnp.maximum(sizes, 1)[..., None]
            return jnp.where(best, 2.0, jnp.where(begins, 1.0, 0.0)), indices(begins, most), means

        inputs = importance, stage.droppable, stage.hidden, visual
        if not most:
            return Choice(importance)
        scores, index, means = by_row(recycled, len(stage.lengths))(*inputs)
        return Choice(scores, hidden=put(stage.hidden, index, means))


def _importance(attention: jax.Array, entropy: jax.Array, patch: jax.Array, weight: float) -> jax.Array:
    """f32 [batch, room], of tokens that stand for patches; others are 0."""
    attention = jnp.where(patch, attention, 0)
    total = jnp.sum(attention, axis=1, keepdims=True)
    shares = jax.nn.softmax(jnp.where(patch, entropy, -1e30), axis=1)
    return jnp.where(patch, attention / jnp.maximum(total, 1e-30) + weight * shares, 0)
