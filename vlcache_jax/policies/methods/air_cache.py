"""AirCache (arXiv 2503.23956, ICCV 2025). No code was released; what is known here comes from notes on the paper."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError
from vlcache_jax.policies.allocate.uniform import Allocate
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.scores.attention import LayerInputs, Score
from vlcache_jax.policies.scores.rounding import ROUNDING
from vlcache_jax.policies.scores.row_blocks import fold_rows, logits_of, softmax_of_rows
from vlcache_jax.policies.shares import SlotBudget, share_slots


@dataclasses.dataclass(frozen=True)
class EliteAttention(Score):
    """Attention from the elite among the text rows to the visual tokens.

    With T the policy's rows (those after the last visual token), V the visual tokens and n the prompt's length:

        w_j     = softmax over j in T of q_(n-1) . k_j / sqrt(d), averaged over all query heads
        E       = {j in T: w_j >= ratio * max w}
        score_j = mean over q in E of softmax over i in V u E that q sees of q . k_i / sqrt(d), at i = j

    averaged over the query heads of a KV head; 0 for tokens outside V u E. A prompt without visual tokens takes all of
    its tokens for V. That E is one set for all heads of a layer is a choice; the notes do not say.
    """

    ratio: float = 0.9
    needs_attention = False  # it computes its own
    is_mass = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise PolicyError(f"ratio={self.ratio} is out of range: it must lie in (0, 1]")

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        column = jax.lax.iota(jnp.int32, inputs.key.shape[1])[None]
        text = (column >= (inputs.lengths - inputs.rows)[:, None]) & inputs.valid
        last = jnp.where(text[:, None, None, None], logits_of(inputs, inputs.lengths[:, None] - 1), -jnp.inf)
        weight = jnp.where(text, jnp.mean(jax.nn.softmax(last, axis=-1), axis=(1, 2, 3)), 0)
        elite = text & (weight >= self.ratio * jnp.max(weight, axis=1, keepdims=True))

        def step(total: jax.Array, row: jax.Array, chosen: jax.Array, logits: jax.Array) -> jax.Array:
            counts = chosen & jnp.take_along_axis(elite, row, axis=1)
            return total + softmax_of_rows(logits, counts.astype(jnp.float32))

        zeros = jnp.zeros((inputs.key.shape[0], inputs.key.shape[2], inputs.key.shape[1]), jnp.float32)
        total = fold_rows(inputs, step, zeros, columns=elite | _visual(inputs))
        return total / jnp.sum(elite, axis=1).astype(jnp.float32)[:, None, None]


def _visual(inputs: LayerInputs) -> jax.Array:
    """The visual tokens of each row, or all tokens of a row that has none; bool [batch, length]."""
    visual = inputs.vision_mask & inputs.valid
    return jnp.where(jnp.any(visual, axis=1, keepdims=True), visual, inputs.valid)


@dataclasses.dataclass(frozen=True)
class StrengthAndSkewness(Allocate):
    """Every layer keeps its text; the rest is shared by the strength and skewness of the visual scores.

        strength_l = sum of the visual scores s_j;   skewness_l = mean of ((s_j - mean s) / std s)^3
        weight_l   = (strength_l / sum of strengths + skewness_l / sum of skewnesses) / 2

    with scores averaged over KV heads. The slots of visual tokens are shared in proportion to the weights, each layer
    within the visual tokens that there are, and add up exactly (`share_slots`). Choices: a negative skewness counts
    as 0; text that alone exceeds the budget gets total // layers slots everywhere.
    """

    def measure(self, inputs: LayerInputs, scores: jax.Array) -> jax.Array:
        """f32 [batch, 3]: strength, skewness, number of visual tokens."""
        visual = _visual(inputs)
        score = jnp.where(visual, jnp.mean(scores, axis=1), 0)
        count = jnp.sum(visual, axis=1).astype(jnp.float32)
        strength = jnp.sum(score, axis=1)
        away = jnp.where(visual, score - (strength / count)[:, None], 0)
        variance = jnp.sum(away**2, axis=1) / count
        skewness = jnp.sum(away**3, axis=1) / count / jnp.maximum(variance, 1e-24) ** 1.5
        # Shared among layers, the rounding of a skewness that is 0 would weigh as much as any.
        skewed = (count > 2) & (variance > (ROUNDING * strength / count) ** 2)
        skewness = jnp.where(skewed, skewness, 0)
        return jnp.stack([strength, skewness, count], axis=1)

    def slots(self, measured: jax.Array, lengths: jax.Array, budget: SlotBudget) -> jax.Array:
        strength, skewness = measured[..., 0], jnp.maximum(measured[..., 1], 0)
        visual = measured[:, 0, 2].astype(jnp.int32)
        total = jnp.asarray(budget.total(lengths))
        text = jnp.minimum(jnp.maximum(lengths - visual, 1), total // budget.layers)

        def share(x: jax.Array) -> jax.Array:
            return x / jnp.maximum(jnp.sum(x, axis=1, keepdims=True), 1e-30)

        weight = (share(strength) + share(skewness)) / 2
        return text[:, None] + jax.vmap(share_slots, (0, 0, None, 0))(
            weight, total - budget.layers * text, 0, lengths - text
        )


@method("air_cache", title="AirCache")
def AirCache(budget: Budget = DEFAULT_BUDGET, *, ratio: float = 0.9, **options: Unpack[Options]) -> Policy:
    """Elite text rows score the visual tokens, layer budgets follow strength and skewness, and text is kept.

    See `EliteAttention` and `StrengthAndSkewness` for the formulas. Text ranks before visual tokens.

    Choices. The paper's retention ratio counts visual tokens only; here the budget counts all tokens, like that of
    every other method, so text takes its slots first: with much text give a larger budget. If text alone exceeds it,
    text is ranked too. The authors released no code, and the formulas are second-hand.

    Query-aware: its rows are the question's.

    Args:
      budget: see `Policy.budget`.
      ratio: a text row is elite if the last one attends to it at least `ratio` times as much as to its best.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> AirCache().protect
      'text'
    """
    return Policy(
        name="air_cache",
        budget=budget,
        score=EliteAttention(ratio),
        allocate=StrengthAndSkewness(),
        recent=0.0,
        protect="text",
        **options,
    )
