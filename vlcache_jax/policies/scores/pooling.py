"""Scores pooled over neighbours: a token beside important ones is kept with them."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError, is_whole
from vlcache_jax.policies.scores.attention import Derived, LayerInputs, Score
from vlcache_jax.policies.window import Window


def pooled(score: Score, size: int, kind: str = "mean", grid_side: int | None = None, skip: int | Window = 0) -> Score:
    """`score` pooled over `size` neighbours in the sequence, or size x size on the patch grid if `grid_side` is given.

    Args:
      score: what to pool.
      size: odd; 1 pools nothing.
      kind: "mean" or "max".
      grid_side: patches along one side of a tile (24 for LLaVA-1.5); None pools in the sequence.
      skip: see `SequencePooled`.

    Raises:
      PolicyError: an even size, an unknown kind, or a grid smaller than the pool.
    """
    if size == 1 and grid_side is None:
        return score
    return SequencePooled(score, size, kind, skip) if grid_side is None else GridPooled(score, size, kind, grid_side)


@dataclasses.dataclass(frozen=True)
class Pooled(Derived):
    """A score pooled over `size` neighbours, or size x size, by their mean or their maximum (`kind`)."""

    size: int
    kind: str

    def __post_init__(self) -> None:
        if not is_whole(self.size, 1) or self.size % 2 == 0:
            raise PolicyError(
                f"pool={self.size!r}: give an odd number of neighbours, the token itself included (1: no pooling)"
            )
        if self.kind not in ("mean", "max"):
            raise PolicyError(f"pooling={self.kind!r} is not known: use 'mean' or 'max'")

    def ties(self, inputs: LayerInputs) -> jax.Array | None:
        """See `Score.ties`: of those that share a maximum the one it comes from, then the others by their own."""
        return self.score(inputs) if self.kind == "max" else super().ties(inputs)


@dataclasses.dataclass(frozen=True)
class SequencePooled(Pooled):
    """The mean or maximum over the `size` nearest positions of the prompt, as SnapKV does it (arXiv 2404.14469).

    Neighbours before the prompt, in the last `skip` tokens or in the padding count as 0 in a mean (it is always divided
    by `size`) and not at all in a maximum: so does SnapKV's code. The last `skip` tokens keep their own score.

    `skip` is a number of tokens, or a `Window`: then those of the policy's window.
    """

    kind: str = "mean"
    skip: int | Window = 0

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        scores = self.score(inputs).astype(jnp.float32)
        length = scores.shape[-1]
        inside = (jax.lax.iota(jnp.int32, length)[None] < inputs.lengths[:, None] - skipped(self.skip, inputs))[:, None]
        nothing = 0.0 if self.kind == "mean" else -jnp.inf
        half = self.size // 2
        wide = jnp.pad(jnp.where(inside, scores, nothing), ((0, 0), (0, 0), (half, half)), constant_values=nothing)
        pool = wide[..., :length]
        for shift in range(1, self.size):
            near = wide[..., shift : shift + length]
            pool = pool + near if self.kind == "mean" else jnp.maximum(pool, near)
        if self.kind == "mean":
            pool = pool / self.size
        return jnp.where(inside, pool, scores)


def skipped(skip: int | Window, inputs: LayerInputs) -> int | jax.Array:
    """The last tokens that a window spares from pooling: `skip`, or i32 [batch, 1]."""
    if not isinstance(skip, Window):
        return skip
    assert inputs.window is not None, "a score that skips a Window needs a policy whose `recent` is one"
    return inputs.window[:, None]


@dataclasses.dataclass(frozen=True)
class GridPooled(Pooled):
    """The mean or maximum over the size x size patches around a visual token, within its tile.

    Only patches that are there count: not those beyond the edge of the tile, nor those that the model's layout left out
    (LLaVA-NeXT drops the padding of a picture). Text and row-break tokens keep their own score. Tiles are pooled one
    by one: neighbours across the seam of two tiles do not count.

    `side` must be the model's own, `vlm.model.spec.vision_grid`; `prefill` refuses another.
    """

    side: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.side, self.size):
            raise PolicyError(
                f"grid_side={self.side!r} is no grid for pool={self.size}: give the patches along one side of a tile, "
                "such as 24 for LLaVA-1.5"
            )

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        scores = self.score(inputs).astype(jnp.float32)
        index, length = inputs.vision_index, scores.shape[-1]
        patch = index >= 0
        tile, row, column = index // self.side**2, index // self.side % self.side, index % self.side
        # The prompt position of a feature is looked up in the sorted indices: no array of all tiles is needed.
        key = jnp.where(patch, index, jnp.iinfo(jnp.int32).max)
        order = jnp.argsort(key, axis=1)
        ordered = jnp.take_along_axis(key, order, axis=1)
        total, count, best = jnp.zeros_like(scores), jnp.zeros_like(scores[:, :1]), jnp.full_like(scores, -jnp.inf)
        reach = range(-(self.size // 2), self.size // 2 + 1)
        for down in reach:
            for right in reach:
                r, c = row + down, column + right
                wanted = (tile * self.side + r) * self.side + c
                at = jnp.minimum(jax.vmap(jnp.searchsorted)(ordered, wanted), length - 1)
                found = patch & (r >= 0) & (r < self.side) & (c >= 0) & (c < self.side)
                found = (found & (jnp.take_along_axis(ordered, at, axis=1) == wanted))[:, None]
                near = jnp.take_along_axis(scores, jnp.take_along_axis(order, at, axis=1)[:, None], axis=2)
                total = total + jnp.where(found, near, 0)
                count = count + found.astype(jnp.float32)
                best = jnp.maximum(best, jnp.where(found, near, -jnp.inf))
        pool = total / jnp.maximum(count, 1) if self.kind == "mean" else best
        return jnp.where(patch[:, None], pool, scores)
