"""How many slots a budget gives all layers together, and each of them."""

import dataclasses
import math
from typing import TypeVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.cache.geometry import segment_alignment, whole_tiles, window_rooms
from vlcache_jax.errors import PolicyError
from vlcache_jax.kernels.precision import PRECISIONS
from vlcache_jax.kernels.varying import varying
from vlcache_jax.policies.budget import Budget, Bytes, ByteShare, Mass, Tokens
from vlcache_jax.typing import ModelSpec

Count = TypeVar("Count", bound=int | jax.Array)

_LARGEST = 2**31 - 1  # a budget beyond what an int32 counts keeps everything
_SKEW = 4  # times the average layer's slots
DENSE_LAYERS = 2
"""The first layers, whose attention is spread widely in trained models: what they get has no such bound."""
_LOWEST_SHARE = 0.01  # of the prompt: no layer gets less (VL-Cache, arXiv 2410.23317, Algorithm 1)


@dataclasses.dataclass(frozen=True)
class SlotBudget:
    """A budget for a model with `layers` layers that share it; build it with `slot_budget`.

    Attributes:
      layers: of the model, those with a window left out: they store it whatever the budget is.
      fraction: of the prompt's full cache; None if the budget is not a fraction.
      per_layer: slots of a layer on average, or None.
      slots: slots of all layers together, or None.
      mass: share of the scores that is enough, below the fraction; None if the budget is to be used up.
      lanes: groups of KV heads that share slots, if heads get different numbers of them (`Allocate.per_head`).
    """

    layers: int
    fraction: float | None = None
    per_layer: int | None = None
    slots: int | None = None
    mass: float | None = None
    lanes: int = 1

    def total(self, length: Count) -> Count:
        """Slots of all layers together, of a KV head on average, for a prompt of `length` tokens; int in, int out.

        Never more than it has.

        Monotone in `length`: the total of the padded length is the static capacity.

        Example:
          >>> SlotBudget(layers=4, per_layer=10).total(7)
          28
        """
        if self.fraction is not None:
            return total_slots(self.layers, length, self.fraction)  # type: ignore[return-value]
        cap = self.slots if self.per_layer is None else self.layers * self.per_layer
        assert cap is not None
        cap, full = min(cap, _LARGEST), self.layers * length
        return min(full, cap) if isinstance(full, int) else jnp.minimum(full, cap)  # type: ignore[return-value]

    def skewed(self, length: Count) -> Count:
        """What no layer after the `DENSE_LAYERS` was seen to exceed, where layers share by the density of attention.

        See docs/method.md, Candidates. Int in, int out.

        Example:
          >>> SlotBudget(layers=4, per_layer=10).skewed(100)
          40
        """
        return _SKEW * (self.total(length) // self.layers)  # type: ignore[return-value]


def slot_budget(
    budget: Budget,
    spec: ModelSpec,
    shared_lanes: int | None = None,
    bits: int | str | None = None,
    others: int | str | None = None,
) -> SlotBudget:
    """What a budget means for a model.

    Args:
      budget: see `Policy.budget`.
      spec: of the model.
      shared_lanes: lanes of a store in which several KV heads share a lane; None for a lane each.
      bits: of a store of codes, or None.
      others: bits of the tokens that are not among the kept ones; None if they are dropped.

    Raises:
      PolicyError: bytes that hold less than one token a layer.
    """
    layers, lanes = len(spec.full_layers), shared_lanes or 1
    if isinstance(budget, Tokens):
        return SlotBudget(layers, per_layer=budget.count, lanes=lanes)
    if isinstance(budget, Mass):
        return SlotBudget(layers, fraction=budget.cap, mass=budget.share, lanes=lanes)
    if isinstance(budget, ByteShare):
        return SlotBudget(layers, fraction=_kept_fraction(budget, spec.head_dim, bits, others), lanes=lanes)
    if not isinstance(budget, Bytes):
        return SlotBudget(layers, fraction=budget, lanes=lanes)
    group = spec.num_kv_heads // lanes if shared_lanes else 1  # KV heads of a lane
    alignment = segment_alignment(bits)
    fixed = 2 * 4 * spec.num_layers * (spec.num_kv_heads if shared_lanes else 1)  # offsets, lengths
    if bits is None:
        unit = alignment * (2 * spec.head_dim * jnp.dtype(spec.dtype).itemsize + 4)  # key and value, position
    else:  # codes, scales and positions
        arrays = jax.tree.leaves(PRECISIONS[bits].shapes((1, 1, alignment, spec.head_dim)))
        unit = sum(x.size * x.dtype.itemsize for x in arrays) + 4 * alignment
    unit *= spec.num_kv_heads // group
    pool = (budget.count - fixed) // unit * alignment
    if whole_tiles(pool) > pool:
        pool = pool // 128 * 128
    windows = sum(window_rooms([w for w in spec.windows if w], max(spec.max_positions, 1), alignment))
    slots = (pool - group * spec.num_layers * (alignment - 1)) // group - windows
    if slots < layers:
        least = fixed + unit * group * (layers + windows // alignment)
        raise PolicyError(
            f"budget={budget.count} bytes cannot hold one token for each of the {layers} layers: give at least {least}"
        )
    return SlotBudget(layers, slots=slots, lanes=lanes)


def token_bytes(head_dim: int, bits: int | str | None) -> float:
    """Bytes of a token's key and value in one KV head, scales included; a float number counts two.

    Example:
      >>> [token_bytes(128, bits) for bits in (None, 8, 4, 2)]
      [512, 276.0, 140.0, 72.0]
    """
    if bits is None:
        return 4 * head_dim
    precision = PRECISIONS[bits]
    arrays = jax.tree.leaves(precision.shapes((1, 1, precision.group, head_dim)))
    return sum(x.size * x.dtype.itemsize for x in arrays) / precision.group


def _kept_fraction(budget: ByteShare, head_dim: int, bits: int | str | None, others: int | str | None) -> float:
    """The fraction of the tokens to keep; see `ByteShare`."""
    full, kept = token_bytes(head_dim, None), token_bytes(head_dim, bits)
    left = 0 if others is None else token_bytes(head_dim, others)
    fraction = math.floor(1e4 * (budget.share * full - left) / (kept - left) + 1e-6) / 1e4
    if fraction <= 0:
        least = max(0.01, math.ceil(100 * left / full))
        raise PolicyError(
            f"{budget.share:.4g} of the bytes hold no token, with the others at bits={others}: "
            f"give {least} % or more, or evicted=Drop()"
        )
    return min(1.0, fraction)


def layer_budgets(density: jax.Array, length: jax.Array | int, budget: float, total: str = "exact") -> jax.Array:
    """Shares the cache among layers in proportion to the density of their attention.

    VL-Cache (arXiv 2410.23317, Algorithm 1): layer l of L gets the share w_l = density_l / sum(density) of
    budget * L * length slots, within 1 % and 100 % of the prompt.

    * `total="exact"`: the slots add up to max(L, floor(budget * L * length)). Layers out of bounds are held at the
      bound and the rest is shared again, until none is; then all are rounded down and the slots left over go one each
      to the largest fractional parts, ties to the lower layer. When both bounds are broken at once, the side that is
      broken by more is held first: only that order always meets the total. Lower bounds that exceed the total
      shrink to total // L.
    * `total="paper"`: floor(clip(w_l * budget * L, 0.01, 1) * length), at least 1: the total is only approximate.

    Args:
      density: f32 [layers], positive.
      length: true prompt length.
      budget: fraction of the full cache to keep, in (0, 1].
      total: "exact" or "paper".

    Returns:
      i32 [layers], each between 1 and `length`.

    Raises:
      PolicyError: budget or total out of range.

    Example:
      >>> layer_budgets(jnp.array([3.0, 1.0]), 100, 0.2).tolist()
      [30, 10]
    """
    if not 0 < budget <= 1:
        raise PolicyError(f"budget {budget} is out of range: give the fraction of the cache to keep, in (0, 1]")
    if total not in ("exact", "paper"):
        raise PolicyError(f"total={total!r} is not known: use 'exact' or 'paper'")
    layers = density.shape[0]
    length = jnp.asarray(length, jnp.int32)
    if total == "paper":
        shares = layer_shares(density, budget)
        return jnp.clip((shares * length.astype(jnp.float32)).astype(jnp.int32), 1, length)

    slots = total_slots(layers, length, budget)
    return share_slots(density, slots, jnp.maximum(1, floor_fraction(length, _LOWEST_SHARE)), length)


def layer_shares(density: jax.Array, budget: float, lowest: float = _LOWEST_SHARE) -> jax.Array:
    """The part of its prompt that each layer keeps in proportion to its density, within `lowest` and 1; not exact.

    Args:
      density: f32 [..., layers], positive.
      budget: fraction of the full cache.
      lowest: the least part.

    Returns:
      f32 [..., layers].

    Example:
      >>> layer_shares(jnp.array([3.0, 1.0]), 0.2).round(3).tolist()
      [0.30000001192092896, 0.10000000149011612]
    """
    return jnp.clip(_normalised(density) * (budget * density.shape[-1]), lowest, 1.0)


def share_slots(weight: jax.Array, slots: jax.Array | int, lower: jax.Array | int, upper: jax.Array) -> jax.Array:
    """Shares `slots` among layers in proportion to `weight`, within bounds, so that they add up exactly.

    The rule of `layer_budgets(total="exact")`.

    Args:
      weight: f32 [layers], not negative.
      slots: to share out; between layers and layers * upper.
      lower: the least a layer gets, at least 1; if that is more than there is, all get slots // layers at least.
      upper: the most a layer gets.

    Returns:
      i32 [layers] with sum `slots`.

    Example:
      >>> share_slots(jnp.array([3.0, 1.0]), 10, 1, jnp.int32(6)).tolist()
      [6, 4]
    """
    lower, length = jnp.minimum(lower, slots // weight.shape[0]), upper
    ideal, free = _share(_normalised(weight), slots, lower, length)
    whole = jnp.clip(jnp.floor(ideal).astype(jnp.int32), lower, length)
    fraction = ideal - whole.astype(jnp.float32)

    def settle(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        whole, rest = state
        sign = jnp.sign(rest)
        able = jnp.where(rest > 0, whole < length, whole > lower)
        priority = jnp.where(
            able, jnp.where(free, sign.astype(jnp.float32) * fraction, -2.0), -jnp.inf
        )  # held layers after free ones
        rank = jnp.argsort(jnp.argsort(-priority, stable=True), stable=True).astype(jnp.int32)
        step = jnp.where(able & (rank < jnp.abs(rest)), sign, 0)
        return whole + step, rest - jnp.sum(step, dtype=jnp.int32)

    # One pass gives the largest fractional parts their slots. Only where float32 cannot count the total exactly
    # (tens of millions of slots) may there be slots to take back, or another pass.
    return jax.lax.while_loop(lambda state: state[1] != 0, settle, (whole, slots - jnp.sum(whole, dtype=jnp.int32)))[0]


def total_slots(layers: int, length: jax.Array | int, budget: float) -> jax.Array | int:
    """Slots of all layers together: max(layers, floor(budget * layers * length)); int in, int out."""
    slots = floor_fraction(layers * length, budget)
    return max(layers, slots) if isinstance(slots, int) else jnp.maximum(layers, slots)


def _normalised(weight: jax.Array) -> jax.Array:
    usable = (weight > 0) & jnp.isfinite(weight)  # a broken checkpoint must not make the loops below endless
    weight = jnp.where(usable, weight, jnp.finfo(jnp.float32).tiny).astype(jnp.float32)
    return weight / jnp.sum(weight, axis=-1, keepdims=True)


def _share(
    weight: jax.Array, total: jax.Array | int, lower: jax.Array, upper: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """f32 [layers] with sum `total`, proportional to `weight` but within the bounds, and which are not held."""
    layers = weight.shape[0]
    low, high = lower.astype(jnp.float32), upper.astype(jnp.float32)

    def again(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        held, free = state
        rest = jnp.asarray(total, jnp.float32) - jnp.sum(jnp.where(free, 0.0, held))
        free_weight = jnp.sum(jnp.where(free, weight, 0.0))
        ideal = weight / jnp.maximum(free_weight, jnp.finfo(jnp.float32).tiny) * rest
        bounded = jnp.clip(ideal, low, high)
        excess = jnp.sum(jnp.where(free, bounded - ideal, 0.0))  # > 0: the lower bounds ask for more than there is
        too_low, too_high = free & (ideal < low), free & (ideal > high)
        hold = jnp.where(excess > 0, too_low, jnp.where(excess < 0, too_high, too_low | too_high))
        return jnp.where(free, jnp.where(hold, bounded, ideal), held), free & ~hold

    ideal = jnp.zeros((layers,), jnp.float32)
    start = varying((ideal, jnp.ones((layers,), bool)), weight, total, lower, upper)
    return jax.lax.fori_loop(0, layers + 1, again, start)
