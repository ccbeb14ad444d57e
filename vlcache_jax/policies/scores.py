"""What a key is worth: one number for each token and KV head of a layer."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError
from vlcache_jax.kernels.column_statistics import ColumnStatistics


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What a score may look at, in one layer of the prefill.

    Attributes:
      key: [batch, length, kv_heads, head_dim], rotated.
      value: like `key`.
      lengths: i32 [batch].
      vision_mask: bool [batch, length].
      layer: i32 [], index of the layer.
      statistics: of the policy's rows; None unless the policy needs them.
    """

    key: jax.Array
    value: jax.Array
    lengths: jax.Array
    vision_mask: jax.Array
    layer: jax.Array
    statistics: ColumnStatistics | None


class Score(Protocol):
    """A hashable function of a layer's inputs."""

    @property
    def needs_attention(self) -> bool:
        """Whether `LayerInputs.statistics` must be there."""

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        """f32 [batch, kv_heads or 1, length]; higher is kept first. Padding may hold anything."""


@dataclasses.dataclass(frozen=True)
class AccumulatedAttention:
    """Attention received from the policy's rows, averaged over query heads (VL-Cache, section 3.2).

    `heads="each"` ranks the tokens for every KV head by the mean over its query heads; `heads="shared"` ranks them
    once for the layer by the mean over all query heads. The paper does not say which.
    """

    heads: str = "each"

    def __post_init__(self) -> None:
        if self.heads not in ("each", "shared"):
            raise PolicyError(f"heads={self.heads!r} is not known: use 'each' or 'shared'")

    @property
    def needs_attention(self) -> bool:
        """True."""
        return True

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        """See `Score.__call__`."""
        assert inputs.statistics is not None
        sums = inputs.statistics.sums
        batch, heads, length = sums.shape
        groups = 1 if self.heads == "shared" else inputs.key.shape[2]
        return jnp.mean(sums.reshape(batch, groups, heads // groups, length), axis=2)


@dataclasses.dataclass(frozen=True)
class RandomScore:
    """Uniform random numbers: the yardstick that every method must beat. The same for every row of a batch."""

    seed: int = 0

    @property
    def needs_attention(self) -> bool:
        """False."""
        return False

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        """See `Score.__call__`."""
        batch, length, kv_heads, _ = inputs.key.shape
        key = jax.random.fold_in(jax.random.key(self.seed), inputs.layer)
        # One number per position, drawn position by position: it does not depend on the padding.
        draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (kv_heads,)))
        return jnp.broadcast_to(draw(jnp.arange(length)).T, (batch, kv_heads, length))
