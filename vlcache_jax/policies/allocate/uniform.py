"""How the budget is shared among layers."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import Count, floor_fraction
from vlcache_jax.errors import PolicyError
from vlcache_jax.policies.budget import Budget, Bytes, Tokens
from vlcache_jax.policies.shares import DENSE_LAYERS, SlotBudget, layer_budgets, layer_shares, share_slots
from vlcache_jax.typing import ModelSpec

if TYPE_CHECKING:
    from vlcache_jax.policies.scores.attention import LayerInputs


class Allocate:
    """A rule. Subclasses are frozen dataclasses, so that a policy can be hashed, and define `slots` at least.

    Attributes:
      threshold: relative threshold of the density it needs (`LayerInputs.density`), or None if it needs none.
      per_head: whether the KV heads of a layer get different numbers of slots. Heads then share lanes (`Policy.lanes`).
      even: whether all layers and heads get the same, up to one slot.
      whole_layers: how many of the first layers may get more than `most`: those that hand on all they have.
    """

    per_head: bool = False
    even: bool = False
    whole_layers: int = 0

    @property
    def threshold(self) -> float | None:
        """See above. A subclass may have a field or an attribute of this name."""
        return None

    def with_layers(self, layers: "Allocate") -> "Allocate":
        """This rule with the slots of each layer decided by `layers`: what is left of it under a budget of mass."""
        return layers

    def check(self, budget: Budget) -> None:
        """Raises PolicyError if it cannot share such a budget; called when a policy is made."""

    def check_model(self, spec: ModelSpec) -> None:
        """Raises PolicyError if it is not made for such a model; called before a prompt is run."""

    def capacity(self, length: int, budget: SlotBudget) -> int:
        """The most slots that all layers together can get, for prompts of up to `length` tokens (static)."""
        return budget.total(length)

    def most(self, length: Count, budget: SlotBudget) -> Count:
        """The most slots that a layer (or head) gets of such a prompt; int in, int out, never falling with the length.

        All of the prompt, if nothing is known. What a rule promises is what layers hand on (`Policy.candidates`), so
        one that looks at the prompt may promise what holds in practice (`SlotBudget.skewed`): the report tells.
        """
        return length

    def least(self, length: int, budget: SlotBudget) -> int:
        """The fewest slots that all layers together get for prompts of `length` tokens (static); 0 if nobody knows.

        What is left of a prompt, its tokens less this, must not fall as it grows: stores have room for the longest.
        """
        return 0

    def measure(self, inputs: "LayerInputs", scores: jax.Array) -> Any:
        """What must be known of a layer: f32 [batch, ...] from its inputs and scores [batch, heads, length].

        Or a pytree of such arrays. The scores are those before `Policy.protect` makes ranks of them.
        """
        return inputs.density

    def slots(self, measured: Any, lengths: jax.Array, budget: SlotBudget) -> jax.Array:
        """i32 [batch, layers] slots, each between 1 and the prompt's length, at most `capacity` together.

        If `per_head`, i32 [batch, layers, kv_heads], and at most `capacity` for each head of a lane on average:
        KV head h lies in lane h * lanes // kv_heads.

        Args:
          measured: f32 [batch, layers, ...], `measure` of every layer.
          lengths: i32 [batch], true prompt lengths.
          budget: of the policy, for this model.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SparsityAware(Allocate):
    """In proportion to the density of each layer's attention (VL-Cache, Algorithm 1); see `layer_budgets`.

    `total="effivlm"` is the rule of EffiVLM-Bench (arXiv 2506.00479), whose code is the only public VL-Cache: the
    window is a tenth of the average layer's slots, the same in every layer, and comes on top of what the others share.
    With n tokens, w_l the layer's share of the densities, budget a and L layers:

        window   = max(1, floor(0.1 a n));   others_l = max(1, floor(clip(w_l 0.9 a L, 0.009, 1) n))
        slots[l] = min(n, window + others_l)

    Nothing makes them add up to the budget: clipping, and one token at least of either kind, may keep less or more.
    """

    threshold: float = 0.01
    total: str = "exact"
    whole_layers = DENSE_LAYERS

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise PolicyError(f"threshold={self.threshold} is out of range: it must lie in (0, 1]")
        if self.total not in ("exact", "paper", "effivlm"):
            raise PolicyError(f"total={self.total!r} is not known: use 'exact', 'paper' or 'effivlm'")

    def check(self, budget: Budget) -> None:
        if self.total != "exact" and isinstance(budget, Tokens | Bytes):
            raise PolicyError(
                f"total={self.total!r} is a rule for fractions of the prompt, not for {budget}: use 'exact'"
            )

    def capacity(self, length: int, budget: SlotBudget) -> int:
        if self.total == "exact":
            return budget.total(length)
        assert budget.fraction is not None
        full = budget.layers * length
        if self.total == "effivlm":
            window = max(1, budget.total(length) // budget.layers // 10)
            return min(full, math.floor((0.9 * budget.fraction + 0.009) * full) + budget.layers * (window + 1))
        return min(full, math.floor((budget.fraction + 0.01) * full) + budget.layers)

    def most(self, length: Count, budget: SlotBudget) -> Count:
        return budget.skewed(length)

    def slots(self, measured: jax.Array, lengths: jax.Array, budget: SlotBudget) -> jax.Array:
        fraction = budget.fraction
        if self.total == "effivlm":
            assert fraction is not None
            window = jnp.maximum(1, jnp.asarray(budget.total(lengths)) // budget.layers // 10)[:, None]
            others = layer_shares(measured, 0.9 * fraction, lowest=0.009) * lengths[:, None].astype(jnp.float32)
            return jnp.minimum(window + jnp.maximum(1, others.astype(jnp.int32)), lengths[:, None])
        if fraction is not None:
            return jax.vmap(lambda density, n: layer_budgets(density, n, fraction, self.total))(measured, lengths)
        lower = jnp.maximum(1, floor_fraction(lengths, 0.01))  # as in `layer_budgets`
        return jax.vmap(share_slots)(measured, budget.total(lengths), lower, lengths)


@dataclasses.dataclass(frozen=True)
class Uniform(Allocate):
    """The same for every layer, up to one slot: the exact total, remainders to the lower layers.

    Example:
      >>> Uniform().slots(jnp.ones((1, 4)), jnp.array([10]), SlotBudget(layers=4, fraction=0.29)).tolist()
      [[3, 3, 3, 2]]
    """

    even = True

    def most(self, length: Count, budget: SlotBudget) -> Count:
        return -(-budget.total(length) // budget.layers)  # type: ignore[return-value]

    def least(self, length: int, budget: SlotBudget) -> int:
        return budget.total(length)

    def slots(self, measured: jax.Array, lengths: jax.Array, budget: SlotBudget) -> jax.Array:
        total = jnp.asarray(budget.total(lengths))[:, None]
        extra = jax.lax.iota(jnp.int32, budget.layers)[None] < total % budget.layers
        return total // budget.layers + extra.astype(jnp.int32)
