"""How many slots each layer gets."""

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError
from vlcache_jax.fractions import floor_fraction

_LOWEST_SHARE = 0.01  # of the prompt: no layer gets less (VL-Cache, arXiv 2410.23317, Algorithm 1)


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
    weight = jnp.where(density > 0, density, jnp.finfo(jnp.float32).tiny).astype(jnp.float32)
    weight = weight / jnp.sum(weight)
    if total == "paper":
        share = jnp.clip(weight * (budget * layers), _LOWEST_SHARE, 1.0)
        return jnp.clip((share * length).astype(jnp.int32), 1, length)

    slots = total_slots(layers, length, budget)
    lower = jnp.minimum(jnp.maximum(1, floor_fraction(length, _LOWEST_SHARE)), slots // layers)
    ideal, free = _share(weight, slots, lower, length)
    whole = jnp.clip(jnp.floor(ideal).astype(jnp.int32), lower, length)
    fraction = ideal - whole

    def settle(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        whole, rest = state
        sign = jnp.sign(rest)
        able = jnp.where(rest > 0, whole < length, whole > lower)
        priority = jnp.where(able, jnp.where(free, sign * fraction, -2.0), -jnp.inf)  # held layers after free ones
        rank = jnp.argsort(jnp.argsort(-priority, stable=True), stable=True)
        step = sign * (able & (rank < jnp.abs(rest)))
        return whole + step, rest - jnp.sum(step)

    # One pass gives the largest fractional parts their slots. Only where float32 cannot count the total exactly
    # (tens of millions of slots) may there be slots to take back, or another pass.
    return jax.lax.while_loop(lambda state: state[1] != 0, settle, (whole, slots - jnp.sum(whole)))[0]


def total_slots(layers: int, length: jax.Array | int, budget: float) -> jax.Array | int:
    """Slots of all layers together: max(layers, floor(budget * layers * length)); int in, int out."""
    slots = floor_fraction(layers * length, budget)
    return max(layers, slots) if isinstance(slots, int) else jnp.maximum(layers, slots)


def _share(
    weight: jax.Array, total: jax.Array | int, lower: jax.Array, upper: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """f32 [layers] with sum `total`, proportional to `weight` but within the bounds, and which are not held."""
    layers = weight.shape[0]
    low, high = lower.astype(jnp.float32), upper.astype(jnp.float32)

    def again(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        held, free = state
        rest = total - jnp.sum(jnp.where(free, 0.0, held))
        free_weight = jnp.sum(jnp.where(free, weight, 0.0))
        ideal = weight / jnp.maximum(free_weight, jnp.finfo(jnp.float32).tiny) * rest
        bounded = jnp.clip(ideal, low, high)
        excess = jnp.sum(jnp.where(free, bounded - ideal, 0.0))  # > 0: the lower bounds ask for more than there is
        too_low, too_high = free & (ideal < low), free & (ideal > high)
        hold = jnp.where(excess > 0, too_low, jnp.where(excess < 0, too_high, too_low | too_high))
        return jnp.where(free, jnp.where(hold, bounded, ideal), held), free & ~hold

    ideal = jnp.zeros((layers,), jnp.float32)
    return jax.lax.fori_loop(0, layers + 1, again, (ideal, jnp.ones((layers,), bool)))
