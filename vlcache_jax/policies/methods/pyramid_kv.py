"""PyramidKV (Cai et al., arXiv 2406.02069)."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import Count
from vlcache_jax.errors import PolicyError, is_whole
from vlcache_jax.policies.allocate.uniform import Allocate
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.methods.snap_kv import WINDOW, observation_window, snap_score
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.rows.spans import LastRows
from vlcache_jax.policies.shares import SlotBudget
from vlcache_jax.policies.window import Recent, Window, forced


@dataclasses.dataclass(frozen=True)
class Pyramid(Allocate):
    """More slots for lower layers, falling arithmetically with depth.

    With C slots a layer on average, w of them for the window, b = C - w and n tokens in the prompt:

        low = b // beta;  high = 2 b - low;  if high > n - w: high = n - w, low = 2 b - high
        slots[l] = w + high - l (high - low) / (layers - 1);  slots[l] = C where n < 2 b or b <= 0

    Whole numbers: the upper half of the layers is rounded down, the lower half mirrors it, so that the slots add up to
    the budget exactly (the authors' code rounds the step, which misses it by a few slots a layer). What the budget
    leaves after C = total // layers goes one each to the lowest layers that have room.
    """

    beta: int = 20
    window: Recent = Window(WINDOW)  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        if not is_whole(self.beta, 1):
            raise PolicyError(f"beta={self.beta!r}: give a whole number, at least 1 (1 is the same for every layer)")

    def most(self, length: Count, budget: SlotBudget) -> Count:
        return 2 * (budget.total(length) // budget.layers) + 1  # type: ignore[return-value]

    def slots(self, measured: jax.Array, lengths: jax.Array, budget: SlotBudget) -> jax.Array:
        layers = budget.layers
        total, n = jnp.asarray(budget.total(lengths))[:, None], lengths[:, None]
        mean, extra = total // layers, total % layers
        window = forced(mean, self.window)[0]
        rest = mean - window
        low = rest // self.beta
        high = 2 * rest - low
        low, high = jnp.where(high > n - window, 2 * rest - (n - window), low), jnp.minimum(high, n - window)
        layer = jax.lax.iota(jnp.int32, layers)[None]
        steps = max(layers - 1, 1)
        depth = jnp.minimum(layer, layers - 1 - layer)
        above = high - (depth * (high - low) + steps - 1) // steps  # of the layer, or of its mirror image
        falling = jnp.where(layer == depth, above, 2 * rest - above)
        falling = jnp.where(2 * layer == layers - 1, rest, falling)
        slots = jnp.where((n < 2 * rest) | (rest <= 0), rest, falling) + window
        room = slots < n
        return slots + (room & (jnp.cumsum(room, axis=1, dtype=jnp.int32) <= extra)).astype(jnp.int32)


@method("pyramid_kv", title="PyramidKV")
def PyramidKV(
    budget: Budget = DEFAULT_BUDGET,
    *,
    beta: int = 20,
    window: int | None = None,
    pool: int = 5,
    pooling: str = "mean",
    recent: Recent | None = None,
    **options: Unpack[Options],
) -> Policy:
    """SnapKV's scores with layer budgets that fall with depth, whatever the prompt holds; see `Pyramid`.

    Choices: as in `SnapKV`, and the rounding of `Pyramid`. The authors' LongBench script uses a window of 8 and 7
    neighbours.

    Query-aware in the scores, not in the layer budgets.

    Args:
      budget: see `Policy.budget`.
      beta: the last layer gets about 1/beta of the average besides its window.
      window: rows that vote, and recent tokens that are kept. By default 32, of which no more are kept
        than `Window(32)` allows.
      pool: odd number of neighbours, 1 for none.
      pooling: "mean" or "max".
      recent: recent tokens to keep, as in `Policy`; the window by default.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range, or a window that does not fit into a budget in tokens.

    Example:
      >>> PyramidKV(budget=256).allocate
      Pyramid(beta=20, window=Window(count=32))
    """
    count, recent = observation_window(window, recent)
    return Policy(
        name="pyramid_kv",
        budget=budget,
        rows=LastRows(count),
        score=snap_score(pool, pooling, recent=recent),
        allocate=Pyramid(beta, recent),
        recent=recent,
        **options,
    )
