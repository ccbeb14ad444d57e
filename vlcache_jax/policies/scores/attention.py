"""What a key is worth: one number for each token and KV head of a layer."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import InputError, PolicyError
from vlcache_jax.inputs import TEXT
from vlcache_jax.kernels.attention import CAUSAL, Mask
from vlcache_jax.kernels.column_statistics import ColumnStatistics
from vlcache_jax.parallel.seeds import random_bits, seed_words, uniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """What a score may look at, in one layer of the prefill.

    Attributes:
      query: [batch, length, heads, head_dim], rotated.
      key: [batch, length, kv_heads, head_dim], rotated.
      value: like `key`.
      lengths: i32 [batch].
      vision_index: i32 [batch, length], as in `Batch`.
      layer: i32 [], index of the layer.
      density: f32 [batch], share of large attention entries; 1 unless `Allocate.threshold` asks for it.
      rows: i32 [batch], how many rows score the keys: the last ones of the prompt, for every `Rows` here.
      statistics: of the policy's rows; None unless the policy needs them.
      window: i32 [batch], the latest tokens that every layer keeps whatever they score, where that is a number of
        tokens (`Tokens`, `Window`, `AverageShare`); None where `Policy.recent` is a fraction of a layer's own slots.
      slots: i32 [batch], of a layer on average, those that are kept whatever they score among them.
      rotate: (x, positions) -> rotary embedding of x [batch, length, heads, head_dim] at i32 [batch, length].
      output: [heads, head_dim, hidden], what the layer multiplies each query head's result with; None unless the score
        needs it (`Score.needs_output`).
      positions: rotary positions, i32 [batch, length] or [batch, 3, length]; None where they are `places`.
      mask: which tokens saw each other. `statistics` know it; a score that works out attention itself must, too.
      index: i32 [batch, length], the place in the prompt of each token, where some were dropped between layers
        (`pruning.stage`); `lengths` and `rows` count those that are left. None: 0, 1, 2 ...
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    lengths: jax.Array
    vision_index: jax.Array
    layer: jax.Array
    density: jax.Array
    rows: jax.Array
    statistics: ColumnStatistics | None = None
    window: jax.Array | None = None
    slots: jax.Array | None = None
    rotate: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    positions: jax.Array | None = None
    output: jax.Array | None = None
    mask: Mask = CAUSAL
    index: jax.Array | None = None

    @property
    def places(self) -> jax.Array:
        """i32 [batch, length]: `index`, filled in."""
        plain = jax.lax.iota(jnp.int32, self.key.shape[1])
        return jnp.broadcast_to(plain, self.valid.shape) if self.index is None else self.index

    @property
    def prompt_lengths(self) -> jax.Array:
        """i32 [batch]: tokens of the prompts, those that were dropped included."""
        if self.index is None:
            return self.lengths
        return jnp.take_along_axis(self.index, self.lengths[:, None] - 1, axis=1)[:, 0] + 1  # the last one stays

    @property
    def next_positions(self) -> jax.Array:
        """i32 [batch]: the rotary position of the token behind the prompt."""
        if self.positions is None:
            return self.prompt_lengths
        positions = self.positions.reshape(len(self.lengths), -1, self.key.shape[1])
        return jnp.max(jnp.where(self.valid[:, None], positions, -1), axis=(1, 2)) + 1

    def padded(self, length: int) -> "LayerInputs":
        """With padding up to `length` tokens."""
        more = length - self.key.shape[1]

        def pad(x: jax.Array, axis: int, value: int = 0) -> jax.Array:
            return jnp.pad(x, [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)], constant_values=value)

        statistics = self.statistics
        if statistics is not None:
            columns = {name: getattr(statistics, name) for name in ("sums", "column_maximum")}
            statistics = statistics._replace(**{name: pad(x, -1) for name, x in columns.items() if x is not None})
        return dataclasses.replace(
            self,
            query=pad(self.query, 1),
            key=pad(self.key, 1),
            value=pad(self.value, 1),
            vision_index=pad(self.vision_index, 1, TEXT),
            positions=None if self.positions is None else pad(self.positions, -1),
            index=None if self.index is None else pad(self.index, 1),
            mask=self.mask if self.mask.blocks is None else Mask(blocks=pad(self.mask.blocks, 1, -1)),
            statistics=statistics,
        )

    def unrotated(self, x: jax.Array) -> jax.Array:
        """f32, like `x` [batch, length, heads, head_dim], which was rotated: what it was before."""
        assert self.rotate is not None
        # Undone by turning back. YaRN stretches as it turns, twice by now.
        one = jnp.ones((1, 1, 1, x.shape[-1]), jnp.float32)
        stretch = self.rotate(one, jnp.zeros((1, 1), jnp.int32))[0, 0, 0, 0]
        positions = self.places if self.positions is None else self.positions
        return self.rotate(x.astype(jnp.float32), -positions) / stretch**2

    @property
    def vision_mask(self) -> jax.Array:
        """bool [batch, length]: True where the token is visual."""
        return self.vision_index != TEXT

    @property
    def valid(self) -> jax.Array:
        """bool [batch, length]: False where there is padding."""
        return jax.lax.iota(jnp.int32, self.key.shape[1])[None] < self.lengths[:, None]


class Score:
    """A function of a layer's inputs. Subclasses are frozen dataclasses, so that a policy can be hashed."""

    @property
    def needs_attention(self) -> bool:
        """Whether `LayerInputs.statistics` must be there. A subclass may write `needs_attention = False`."""
        return True

    @property
    def needs_output(self) -> bool:
        """Whether `LayerInputs.output` must be there."""
        return False

    @property
    def needs_maximum(self) -> bool:
        """Whether `LayerInputs.statistics` must have the `column_maximum`."""
        return False

    @property
    def is_mass(self) -> bool:
        """Whether it is attention received, not negative, so that a share of its sum means something (`vlc.Mass`)."""
        return self.needs_attention

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        """f32 [batch, kv_heads or 1, length]; higher is kept first. Padding may hold anything."""
        raise NotImplementedError

    def ties(self, inputs: LayerInputs) -> jax.Array | None:
        """Like the scores: which of two equal ones is kept first. None: the lower position, as where these are equal.

        For scores with ties by construction. A score made from another passes on the other's.
        """
        return None


@dataclasses.dataclass(frozen=True)
class Derived(Score):
    """A score made from another: it needs what that needs, and has its ties."""

    score: Score

    @property
    def needs_attention(self) -> bool:
        """That of the other score."""
        return self.score.needs_attention

    @property
    def needs_output(self) -> bool:
        """That of the other score."""
        return self.score.needs_output

    @property
    def needs_maximum(self) -> bool:
        """That of the other score."""
        return self.score.needs_maximum

    def ties(self, inputs: LayerInputs) -> jax.Array | None:
        """See `Score.ties`; those of the other score."""
        return self.score.ties(inputs)


@dataclasses.dataclass(frozen=True)
class AccumulatedAttention(Score):
    """Attention received from the policy's rows, averaged over query heads (VL-Cache, section 3.2).

    `heads="each"` ranks the tokens for every KV head by the mean over its query heads; `heads="shared"` ranks them
    once for the layer by the mean over all query heads. The paper does not say which. `normalised` divides the score of
    token j by the number of rows that see it, for scores from all rows.
    """

    heads: str = "each"
    normalised: bool = False

    def __post_init__(self) -> None:
        if self.heads not in ("each", "shared"):
            raise PolicyError(f"heads={self.heads!r} is not known: use 'each' or 'shared'")

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        assert inputs.statistics is not None
        sums = inputs.statistics.sums
        batch, heads, length = sums.shape
        groups = 1 if self.heads == "shared" else inputs.key.shape[2]
        mean = jnp.mean(sums.reshape(batch, groups, heads // groups, length), axis=2)
        if not self.normalised:
            return mean
        first = inputs.mask.first()  # row that sees a column
        first = jax.lax.iota(jnp.int32, length)[None] if first is None else first
        seen = jnp.minimum(inputs.lengths[:, None] - first, inputs.rows[:, None])
        return mean / jnp.maximum(seen, 1).astype(jnp.float32)[:, None]


@dataclasses.dataclass(frozen=True)
class RandomScore(Score):
    """Uniform random numbers: the yardstick that every method must beat. The same for every row of a batch.

    Raises:
      PolicyError: a seed that is no integer of up to 64 bits.
    """

    needs_attention = False
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            if not isinstance(self.seed, int | np.integer):
                raise InputError(f"{self.seed!r} is not an integer")
            seed_words(self.seed, ())
        except InputError as error:
            raise PolicyError(f"seed={self.seed!r} is not known: give an integer below 2**64") from error

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        batch, length, kv_heads, _ = inputs.key.shape
        words = jnp.asarray(seed_words(self.seed, ()))
        # Drawn position by position, so that it does not depend on the padding.
        draw = jax.vmap(lambda i: uniform(random_bits(words, (inputs.layer, i), kv_heads)))
        return jnp.broadcast_to(draw(jax.lax.iota(jnp.int32, length)).T[None], (batch, kv_heads, length))


@dataclasses.dataclass(frozen=True)
class Recency(Score):
    """The position: later tokens first."""

    needs_attention = False

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        return jnp.broadcast_to(jnp.arange(inputs.key.shape[1], dtype=jnp.float32), inputs.valid.shape)[:, None]
