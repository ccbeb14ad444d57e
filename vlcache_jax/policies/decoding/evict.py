"""`Evict`: prompt and generated tokens in one cache of fixed size, from which every step evicts the weakest token.

    context.keys[b, h]   | layer 0: t t t t t t . . free | layer 1: t t t t t . . . free | ...
                           <-----------> lengths           <-- capacity for each layer -->

A layer holds C tokens between two steps and C + 1 within one, its own included. The token that a step gives up is
overwritten by the next: it lies in the store until then, and nothing reads it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlcache_jax.cache.geometry import align
from vlcache_jax.cache.state import KVState
from vlcache_jax.cache.store import PackedStore, lanes_spec, split
from vlcache_jax.files.exporting import exportable
from vlcache_jax.policies.budget import Tokens
from vlcache_jax.policies.decoding.rules import Evict
from vlcache_jax.policies.policy import Policy
from vlcache_jax.policies.shares import SlotBudget
from vlcache_jax.policies.window import forced


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SlotWeights:
    """What `Evict` knows of the tokens in the context.

    Attributes:
      scores: f32 [batch, lanes, slots]. Attention received by the token of each slot.
      sizes: i32 [batch, layers]. Tokens a layer holds between two steps.
      room: slots of a layer in the context (static).
    """

    scores: jax.Array
    sizes: jax.Array
    room: int = dataclasses.field(metadata={"static": True})

    def partition_specs(self) -> "SlotWeights":
        """See `PackedStore.partition_specs`."""
        spec = lanes_spec(*self.scores.shape[:2])
        return SlotWeights(spec, PartitionSpec(spec[0]), self.room)  # type: ignore[arg-type]


def layer_room(policy: Policy, budget: SlotBudget, length: int) -> int:
    """Slots of a layer's segment, for prompts of up to `length` tokens: C, one more, and alignment."""
    most = policy.budget.count if isinstance(policy.budget, Tokens) else -(-budget.total(length) // budget.layers)
    return int(align(most + 1))


def slot_weights(
    policy: Policy, scores: jax.Array, order: jax.Array, requested: jax.Array, context: PackedStore, room: int
) -> SlotWeights:
    """The weights of what was kept of the prompt, which the prefill's scores are.

    Args:
      policy: with `Evict` as its rule.
      scores: f32 [layers, batch, heads or 1, entries], of the candidates.
      order: i32 [layers, batch, heads or 1, entries], from `selection.select`.
      requested: i32 [batch, layers], slots that the allocator gave.
      context: the packed store.
      room: slots of a layer.
    """
    layers, batch, heads, entries = scores.shape
    _, lanes, slots = context.positions.shape
    kept = jnp.take_along_axis(scores, jnp.minimum(order[..., :room], entries - 1), axis=3)
    kept = jnp.pad(kept, [(0, 0)] * 3 + [(0, room - kept.shape[3])])
    kept = kept.transpose(1, 2, 0, 3).reshape(batch, heads, layers * room)
    kept = jnp.pad(kept, [(0, 0)] * 2 + [(0, slots - layers * room)])
    sizes = jnp.full_like(requested, policy.budget.count) if isinstance(policy.budget, Tokens) else requested
    return SlotWeights(split(jnp.broadcast_to(kept, (batch, lanes, slots)).astype(jnp.float32)), sizes, room)


def evicting(state: KVState) -> tuple[Callable[..., Any], Any, Callable[[Any], KVState]]:
    """The attention of a step, the first layer's carry, and the new state from the last layer's carry.

    A layer's slice of the store is read, changed and written back: the store is rewritten once a step, in place. Writes
    at a slot of its own for every row and KV head would make the compiler copy all of it.
    """
    context, weights, rule = state.context, state.observed, state.decoding
    assert isinstance(weights, SlotWeights)
    room = weights.room
    assert isinstance(rule, Evict)
    assert rule.recent is not None
    assert rule.sinks is not None
    recent, sinks = rule.recent, rule.sinks
    held = jnp.minimum(context.lengths[..., 0] + 1, weights.sizes + 1)  # within the step
    here = state.next_position[:, None, None]

    def attend(query, key, value, carry, layer):
        keys, values, positions, scores = (
            jax.lax.dynamic_slice_in_dim(x, layer * room, room, axis=2) for x in carry
        )  # [batch, kv_heads, room, ...]
        batch, kv_heads, _, head_dim = keys.shape
        length, size, count = (x[:, layer, None, None] for x in (context.lengths[..., 0], weights.sizes, held))

        latest, first = forced(size, recent, sinks)
        weak = (jax.lax.iota(jnp.int32, room)[None, None] < length) & (positions < here - latest) & (positions >= first)
        lowest = jnp.min(jnp.where(weak, scores, jnp.inf), axis=2, keepdims=True)
        weakest = jnp.where(weak & (scores <= lowest), positions, -1)
        last_of_lowest = jnp.argmax(weakest, axis=2, keepdims=True).astype(jnp.int32)
        slot = jnp.where(length <= size, length, last_of_lowest)  # [batch, kv_heads, 1]
        new = jax.lax.iota(jnp.int32, room)[None, None] == slot
        keys = jnp.where(new[..., None], key.swapaxes(1, 2).astype(keys.dtype), keys)
        values = jnp.where(new[..., None], value.swapaxes(1, 2).astype(values.dtype), values)
        positions = jnp.where(new, here, positions)

        inside = jax.lax.iota(jnp.int32, room)[None, None] < count
        q = query[:, 0].reshape(batch, kv_heads, -1, head_dim)
        logits = head_dim**-0.5 * jnp.einsum("bhgd,bhsd->bhgs", q, keys, preferred_element_type=jnp.float32)
        probabilities = jax.nn.softmax(jnp.where(inside[:, :, None], logits, -jnp.inf), axis=-1)
        visible = jnp.where(inside[..., None], values, 0)  # 0 * NaN would be NaN
        out = jnp.einsum(
            "bhgs,bhsd->bhgd", probabilities.astype(values.dtype), visible, preferred_element_type=jnp.float32
        )
        received = jnp.mean(probabilities, axis=2)
        if rule.heads == "shared":
            received = jnp.broadcast_to(jnp.mean(received, axis=1, keepdims=True), received.shape)
        old = jnp.where(new, 0, scores) if rule.weigh == "sum" else 0
        scores = jnp.where(inside, old + received, 0)

        carry = tuple(
            split(jax.lax.dynamic_update_slice_in_dim(x, part, layer * room, axis=2))
            for x, part in zip(carry, (keys, values, positions, scores))
        )
        return out.reshape(batch, 1, -1, head_dim), carry, None

    def close(carry: Any) -> KVState:
        keys, values, positions, scores = carry
        new = {"keys": keys, "values": values, "positions": positions, "lengths": held[..., None]}
        return dataclasses.replace(
            state,
            context=dataclasses.replace(context, **new),
            observed=dataclasses.replace(weights, scores=scores),
        )

    return attend, (context.keys, context.values, context.positions, weights.scores), close
