"""CSP, cross-self pruning (Pei et al., arXiv 2412.04652)."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.errors import PolicyError, is_number
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.methods.snap_kv import WINDOW, observation_window
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.rows.spans import LastRows
from vlcache_jax.policies.scores.attention import LayerInputs, Score
from vlcache_jax.policies.scores.row_blocks import fold_rows
from vlcache_jax.policies.scores.staged import open_tokens, staged
from vlcache_jax.policies.window import Recent, Window


@dataclasses.dataclass(frozen=True)
class CrossSelf(Score):
    """Attention within a kind of token, text or visual, and across kinds, ranked apart.

    Over the policy's rows q, averaged over the query heads of a KV head:

        A1[q, j] = exp(z[q, j]) / (1 + sum over i of exp(z[q, i])),   z the logits: a softmax plus one
        self_j   = sum of A1[q, j] over the rows of j's own kind;   cross_j = that over the others

    Of the k slots that the window leaves to the scores, k - floor(cross k) go to the best `self`, the others to the
    best `cross` of what is left. A token that no row of its own kind attends to is none of the former.

    Attributes:
      cross: the part of the slots that goes by attention across kinds.
      recent: `Policy.recent`.
    """

    cross: float = 0.1
    recent: Recent = Window(WINDOW)  # noqa: RUF009  # frozen
    needs_attention = False  # it computes its own
    is_mass = False

    def __post_init__(self) -> None:
        if not is_number(self.cross, 0, 1):
            raise PolicyError(f"cross={self.cross!r} is out of range: give a fraction in [0, 1]")

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        visual = inputs.vision_mask

        def step(total: jax.Array, row: jax.Array, chosen: jax.Array, logits: jax.Array) -> jax.Array:
            largest = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), 0)
            weights = jnp.exp(logits - largest)
            attention = weights / (jnp.exp(-largest) + jnp.sum(weights, axis=-1, keepdims=True))
            attention = jnp.mean(jnp.where(chosen[:, None, None, :, None], attention, 0), axis=2)
            same = (jnp.take_along_axis(visual, row, axis=1)[..., None] == visual[:, None])[:, None]
            both = jnp.where(same, attention, 0), jnp.where(same, 0, attention)
            return total + jnp.stack([jnp.sum(x, axis=2) for x in both])

        batch, length, kv_heads, _ = inputs.key.shape
        own, other = fold_rows(inputs, step, jnp.zeros((2, batch, kv_heads, length), jnp.float32))
        competes, slots = open_tokens(inputs, self.recent)
        return staged(own, other, competes, slots - floor_fraction(slots, self.cross))


@method("csp", title="CSP")
def CSP(
    budget: Budget = DEFAULT_BUDGET,
    *,
    cross: float = 0.1,
    window: int | None = None,
    recent: Recent | None = None,
    **options: Unpack[Options],
) -> Policy:
    """Slots apart for what the question reads in text and for what it looks at in images; see `CrossSelf`.

    Choices. `cross` is 0.1, the default of EffiVLM-Bench's version; the authors' code reads it from a file for each
    data set (0, 0.1 or 0.5). Window and budgets are `SnapKV`'s. A token that both rankings choose takes one slot (in
    the authors' code it lies in the cache twice), and where text has run out its slots go to the other ranking.

    Query-aware, if the question lies in the last rows.

    Args:
      budget: see `Policy.budget`.
      cross: the part of the slots that goes by attention from text to visual tokens, or the other way.
      window: rows that score, and recent tokens that are kept. By default 32, of which no more are kept
        than `Window(32)` allows.
      recent: recent tokens to keep, as in `Policy`; the window by default.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range, or a window that does not fit into a budget in tokens.

    Example:
      >>> CSP().score.cross
      0.1
    """
    count, recent = observation_window(window, recent)
    return Policy(
        name="csp",
        budget=budget,
        rows=LastRows(count),
        score=CrossSelf(cross, recent),
        recent=recent,
        **options,
    )
