"""Layer budgets that hold the same share of every layer's scores."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import Count
from vlcache_jax.policies.allocate.uniform import Allocate
from vlcache_jax.policies.scores.attention import LayerInputs
from vlcache_jax.policies.shares import DENSE_LAYERS, SlotBudget
from vlcache_jax.policies.window import Recent, forced


@dataclasses.dataclass(frozen=True)
class EqualMass(Allocate):
    """Every layer keeps the shortest prefix of its ranking that holds the same share p of the layer's score.

    Let c[l, k] be the share held by the k best tokens of layer l. A token of rank k + 1 belongs to the prefix of mass p
    as long as c[l, k] < p. So the p at which all prefixes add up to the budget need not be searched for: the budget
    goes to the smallest c[l, k] of all layers, ties to the lower rank and then to the lower layer, and is met exactly.
    PrefixKV finds p by bisection. Scores must not be negative.
    """

    whole_layers = DENSE_LAYERS

    def most(self, length: Count, budget: SlotBudget) -> Count:
        return 2 * budget.skewed(length)  # type: ignore[return-value]

    def measure(self, inputs: LayerInputs, scores: jax.Array) -> jax.Array:
        """f32 [batch, length]: the share of the better tokens, for each rank; infinite beyond the prompt."""
        valid = inputs.valid
        mass = jnp.where(valid, jnp.mean(scores.astype(jnp.float32), axis=1), 0)
        ranked = -jnp.sort(-mass, axis=1)
        better = jnp.cumsum(ranked, axis=1) - ranked
        return jnp.where(valid, better / jnp.maximum(jnp.sum(mass, axis=1, keepdims=True), 1e-30), jnp.inf)

    def slots(self, measured: jax.Array, lengths: jax.Array, budget: SlotBudget) -> jax.Array:
        rows, layers, length = measured.shape
        by_rank = measured.swapaxes(1, 2).reshape(rows, -1)
        order = jnp.argsort(by_rank, axis=1, stable=True)
        total = jnp.asarray(budget.total(lengths))
        if budget.mass is not None:
            total = jnp.minimum(total, jnp.sum(by_rank < budget.mass, axis=1, dtype=jnp.int32))
        taken = jax.lax.iota(jnp.int32, layers * length)[None] < total[:, None]
        count = jax.vmap(lambda o, t: jnp.zeros((layers,), jnp.int32).at[o % layers].add(t))
        return count(order, taken.astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class RetainedMass(EqualMass):
    """The slots of a budget of mass (`vlc.Mass`): in each layer the fewest that hold the share, below the cap.

    A layer's window, sinks and protected tokens are kept whatever they score, and hold their share as well. So c[l, k]
    is counted over the order in which the layer takes tokens: the forced ones, the protected kind, then the best
    scores. A window that is a fraction of the slots grows with them: of s slots, core(s) = s - floor(recent s) + 1 hold
    the last token, the sinks and the best others, and only these are counted, so that such a layer holds the
    share at least and gets more slots than the fewest, if its window holds something, too.

    With scores for each KV head the order is that of their mean; as each head then keeps its own best, they hold at
    least as much.
    """

    recent: Recent = 0.0
    sinks: int = 0
    protect: str | None = None

    def measure(self, inputs: LayerInputs, scores: jax.Array) -> jax.Array:
        """f32 [batch, length]: for each number of slots the share that they hold; infinite beyond the prompt."""
        valid, ends, length = inputs.valid, inputs.lengths[:, None], scores.shape[-1]
        mass = jnp.mean(scores.astype(jnp.float32), axis=1)
        mass = jnp.where(valid & jnp.isfinite(mass), jnp.maximum(mass, 0), 0)
        index = jax.lax.iota(jnp.int32, length)[None]
        window = 1 if inputs.window is None else inputs.window[:, None]
        kind = jnp.where(inputs.vision_mask == (self.protect == "vision"), 1, 2) if self.protect else 1
        kind = jnp.where((index >= ends - window) | (index < self.sinks), 0, kind)
        kind = jnp.where(valid, kind, 3)
        entry = jnp.where(index < self.sinks, index, self.sinks + ends - 1 - index)  # as `forced` takes them
        entry = jnp.where(index == ends - 1, -1, entry)
        *_, ranked = jax.lax.sort((kind, jnp.where(kind == 0, entry.astype(jnp.float32), -mass), mass), num_keys=2)
        held = jnp.cumsum(ranked, axis=1)
        share = jnp.pad(held, ((0, 0), (1, 0)))[:, :-1] / jnp.maximum(held[:, -1:], 1e-30)
        if isinstance(self.recent, int | float):
            core = index - forced(index, self.recent)[0] + 1
            share = jnp.take(share, core[0], axis=1)
        return jnp.where(valid, share, jnp.inf)
