"""CoreMatching (arXiv 2505.19235): the visual tokens stay that make the same neurons fire as the question does."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.pruning.method import Between, Count, Pruning, named
from vlcache_jax.pruning.options import check_part, check_whole
from vlcache_jax.pruning.stage import Choice, Stage


@named("core_matching")
@dataclasses.dataclass(frozen=True)
class CoreMatching(Pruning):
    """Behind one layer, the core tokens go on: visual ones that share many neurons with a late token of the prompt.

    A neuron of the layer's MLP fires for a token where activation(gate) * up > 0. With c_j the number of neurons that
    fire both for visual token j and for the prompt's token `reference` from the end, sorted to c_0 >= ... >= c_(N-1),
    the knee is the point i farthest from the line between the first and the last one,

        argmax_i | (c_(N-1) - c_0) i - (N - 1) (c_i - c_0) |

    and those tokens stay whose number is above that of the knee, at most floor(keep N) of the prompt's N. How many that
    is depends on the image; shapes are static, so `keep` is what the prefill costs, and less is stored where there are
    fewer.

    After the released code, not the paper, and it deviates: the code does so in each of layers 6 to 19 of 32, for that
    layer alone, and overwrites keys and values of the others with zeros, which goes on to take attention from the rest
    and saves nothing; here the others are gone, for all layers behind. The paper's core neurons, by which answers
    run on a part of each MLP, are not here.

    Attributes:
      layer: behind how many layers tokens are dropped; None for 7 of 32, behind the layer with number 6.
      keep: the largest part of the prompt's visual tokens that goes on.
      reference: which token from the end the others are compared with; the authors' is the fifth.
      rooms: see `pruning.method.Pruning`.

    Raises:
      PolicyError: numbers out of range.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.1), pruning=vlc.CoreMatching(keep=0.5))
    """

    layer: int | None = None
    keep: float = 0.5
    reference: int = 5
    looks_back: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_part(self.name, keep=self.keep)
        check_whole(self.name, 1, reference=self.reference)
        if self.layer is not None:
            check_whole(self.name, 1, layer=self.layer)

    def cuts(self, layers: int) -> tuple[int, ...]:
        layer = 3 * layers // 16 + 1 if self.layer is None else self.layer
        return (layer,) if self.keep < 1 else ()

    def kept(self, cut: int, visual: Count, left: Count) -> Count:
        return floor_fraction(visual, self.keep)

    def watch(self, stage: Stage, neurons: jax.Array) -> jax.Array:
        """See `Pruning.watch`: i32 [batch, room], neurons that fire for each token and for the one of reference."""
        fires = neurons > 0
        at = jnp.maximum(stage.lengths - self.reference, 0)
        of_reference = jnp.take_along_axis(fires, at[:, None, None], axis=1)
        return jnp.sum(fires & of_reference, axis=2, dtype=jnp.int32)

    def choose(self, cut: int, between: Between) -> Choice:
        stage = between.stage

        def chosen(shared: jax.Array, droppable: jax.Array) -> tuple[jax.Array, jax.Array]:
            count = jnp.sum(droppable, axis=1, keepdims=True, dtype=jnp.int32)
            curve = -jnp.sort(jnp.where(droppable, -shared, 1), axis=1)  # falling; others are -1 and come last
            first, last = curve[:, :1], jnp.take_along_axis(curve, jnp.maximum(count - 1, 0), axis=1)
            index = jax.lax.iota(jnp.int32, curve.shape[1])[None]
            distance = jnp.abs((last - first) * index - (count - 1) * (curve - first))
            knee = jnp.argmax(jnp.where(index < count, distance, -1), axis=1)[:, None]
            core = droppable & (shared > jnp.take_along_axis(curve, knee, axis=1))
            most = floor_fraction(count[:, 0], self.keep)
            return shared.astype(jnp.float32), jnp.minimum(jnp.sum(core, axis=1, dtype=jnp.int32), most)

        return Choice(*by_row(chosen, len(stage.lengths))(between.watched, stage.droppable))
