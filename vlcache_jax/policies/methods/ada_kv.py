"""Ada-KV (Feng et al., arXiv 2407.11550, NeurIPS 2025)."""

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import as_fraction
from vlcache_jax.cache.selection import largest
from vlcache_jax.errors import PolicyError, is_number
from vlcache_jax.policies.allocate.uniform import Allocate, Uniform
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.methods.pyramid_kv import Pyramid
from vlcache_jax.policies.methods.snap_kv import WINDOW, observation_window, snap_score
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.rows.spans import LastRows
from vlcache_jax.policies.scores.attention import LayerInputs
from vlcache_jax.policies.shares import SlotBudget
from vlcache_jax.policies.window import Recent, Window, forced, settled
from vlcache_jax.typing import ModelSpec


@dataclasses.dataclass(frozen=True)
class AdaptiveHeads(Allocate):
    """Shares the slots of each layer among the KV heads of a lane, by where the best scores are.

    With s slots of the layer for each head, w of them for the window, b = s - w, and G heads in the lane:

        n[h] = how many of the G b best scores of all heads of the lane are head h's, the window left out
        B[h] = (1 - floor) n[h] + floor b;   slots[h] = w + B[h]

    in whole numbers that add up to G s exactly: rounded down, and what is left goes one each to the largest fractional
    parts. Ties go to the lower head. (The authors round each head and cut floor b to a whole number, which misses the
    sum by a few slots.)

    Attributes:
      layers: slots of each layer.
      floor: the part of the average that every head gets.
      recent: `Policy.recent`.
    """

    layers: Allocate = Uniform()  # noqa: RUF009  # frozen
    floor: float = 0.2
    recent: Recent = Window(WINDOW)  # noqa: RUF009  # frozen
    per_head = True

    def __post_init__(self) -> None:
        if not is_number(self.floor, 0, 1):
            raise PolicyError(f"floor_alpha={self.floor!r} is out of range: give a fraction in [0, 1]")

    @property
    def threshold(self) -> float | None:
        """That of the layers' rule."""
        return self.layers.threshold

    def with_layers(self, layers: Allocate) -> Allocate:
        return dataclasses.replace(self, layers=layers)

    def check(self, budget: Budget) -> None:
        self.layers.check(budget)

    def check_model(self, spec: ModelSpec) -> None:
        self.layers.check_model(spec)

    def capacity(self, length: int, budget: SlotBudget) -> int:
        return self.layers.capacity(length, budget)

    def measure(self, inputs: LayerInputs, scores: jax.Array) -> Any:
        """The scores, f32 [batch, kv_heads, length], how many tokens there are, and what the layers' rule measures."""
        batch, length, kv_heads, _ = inputs.key.shape
        every = jnp.broadcast_to(scores.astype(jnp.float32), (batch, kv_heads, length))
        return every, inputs.lengths, self.layers.measure(inputs, scores)

    def slots(self, measured: Any, lengths: jax.Array, budget: SlotBudget) -> jax.Array:
        scores, held, of_layers = measured
        batch, layers, kv_heads, length = scores.shape
        group = kv_heads // budget.lanes
        slots = self.layers.slots(of_layers, lengths, budget)  # [batch, layers]
        mean = jnp.asarray(budget.total(lengths)) // budget.layers
        window = forced(slots, settled(self.recent, mean))[0]
        rest = slots - window
        before = jax.lax.iota(jnp.int32, length)[None, None] < (held - window)[..., None]
        candidates = jnp.where(before[:, :, None], jnp.nan_to_num(scores), -jnp.inf)
        best = largest(candidates.reshape(batch, layers, budget.lanes, -1), (group * rest)[..., None, None])
        found = jnp.sum(best.reshape(batch, layers, budget.lanes, group, length), axis=-1, dtype=jnp.int32)
        shares = _with_floor(found, rest[..., None, None], self.floor)
        return window[..., None] + shares.reshape(batch, layers, kv_heads)


def _with_floor(found: jax.Array, mean: jax.Array, floor: float) -> jax.Array:
    """(1 - floor) found + floor mean in whole numbers with the sum of `found`: [..., group], mean [..., 1]."""
    part = as_fraction(floor)
    top, bottom = part.numerator, part.denominator
    # Divided first, so that no product exceeds the count or the square of the denominator.
    over = (bottom - top) * (found % bottom) + top * (mean % bottom)
    whole = (bottom - top) * (found // bottom) + top * (mean // bottom) + over // bottom
    left = jnp.sum(found - whole, axis=-1, keepdims=True, dtype=jnp.int32)
    rank = jnp.argsort(jnp.argsort(-(over % bottom), axis=-1, stable=True), axis=-1, stable=True).astype(jnp.int32)
    return jnp.where(rank < left, whole + 1, whole)


@method("ada_kv", title="Ada-KV")
def AdaKV(
    budget: Budget = DEFAULT_BUDGET,
    *,
    floor_alpha: float = 0.2,
    pyramid: bool = False,
    beta: int = 20,
    window: int | None = None,
    pool: int = 7,
    pooling: str = "max",
    recent: Recent | None = None,
    mask_visual_sinks: bool = False,
    lanes: int = 1,
    **options: Unpack[Options],
) -> Policy:
    """SnapKV's scores, with the slots of a layer shared among its KV heads; see `AdaptiveHeads`.

    Heads whose attention is concentrated give slots to those whose attention is spread. The memory is what SnapKV
    takes: heads share a lane of the store, whose size is the sum. Window 32, 7 neighbours and the maximum are the
    authors' defaults.

    Choices. floor_alpha is 0.2, as in the authors' LongBench script and their advice for grouped queries; the default
    of their programming interface is 0.5. Votes are averaged over the query heads of a KV head and then pooled. Their
    optional normalisation of a head's scores is left out. With a window that is a fraction, each head's is that
    fraction of its own slots.

    Query-aware, if the question lies in the last rows.

    Args:
      budget: see `Policy.budget`; a number of tokens is of a layer and KV head on average.
      floor_alpha: the part of the average that every head gets, whatever it scores; 1 is the same for every head.
      pyramid: layer budgets that fall with depth, as in `PyramidKV`; else the same for every layer.
      beta: see `PyramidKV`.
      window: rows that vote, and recent tokens that every head keeps. By default 32, of which no more are kept
        than `Window(32)` allows.
      pool: odd number of neighbours, 1 for none.
      pooling: "mean" or "max".
      recent: recent tokens to keep, as in `Policy`; the window by default.
      mask_visual_sinks: see `MaskVisualSinks`.
      lanes: groups of KV heads; slots are shared within a group only. 1: all heads of a layer. See `Policy.lanes`.
      **options: see `Options`. `candidate_fraction` bounds the slots of a head, too.

    Raises:
      PolicyError: an option out of range, or a window that does not fit into a budget in tokens.

    Example:
      >>> AdaKV(budget=256).lanes
      1
    """
    count, recent = observation_window(window, recent)
    return Policy(
        name="ada_kv",
        budget=budget,
        rows=LastRows(count),
        score=snap_score(pool, pooling, recent=recent, mask_visual_sinks=mask_visual_sinks),
        allocate=AdaptiveHeads(Pyramid(beta, recent) if pyramid else Uniform(), floor_alpha, recent),
        recent=recent,
        lanes=lanes,
        **options,
    )
