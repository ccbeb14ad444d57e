"""For rules that weigh the slots of the prompt one by one in every step: what the prefill noted of each of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vlcache_jax.cache.geometry import align
from vlcache_jax.cache.state import KVState
from vlcache_jax.cache.store import lanes_spec, split
from vlcache_jax.errors import PolicyError
from vlcache_jax.files.exporting import exportable
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.policies.budget import Tokens
from vlcache_jax.policies.decoding.rule import DecodingRule, Prompt, Step
from vlcache_jax.policies.parts import Parts
from vlcache_jax.policies.shares import SlotBudget

Weigh = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SlotNotes:
    """What was noted of the tokens in the context.

    Attributes:
      values: f32 [batch, lanes, slots], of the token of each slot; 0 in free ones.
      rooms: slots of each layer in the context (static).
    """

    values: jax.Array
    rooms: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def partition_specs(self) -> "SlotNotes":
        """See `PackedStore.partition_specs`."""
        spec: Any = lanes_spec(*self.values.shape[:2])
        return SlotNotes(PartitionSpec(*spec), self.rooms)  # type: ignore[arg-type]


class NotingRule(DecodingRule):
    """A rule that notes a number of every token of each layer (`note`, f32 [batch, length]) and evicts nothing.

    It reads the slots of a layer as plain arrays: contexts are not shared by questions, nor coded, and every layer has
    the same number of slots. Nothing is evicted, so it goes with the full cache, too.
    """

    rewrites_context = True
    evicts = False
    whole_prompts = True
    unlimited = False

    def tail_tokens(self, max_new_tokens: int) -> int:
        return max_new_tokens

    def check(self, policy: Parts) -> None:
        name = f"{policy.name}: {type(self).__name__}"
        if policy.bits is not None or policy.evicted.saves:
            raise PolicyError(
                f"{name} reads single slots, but bits={policy.bits} and evicted={policy.evicted}: use bits=None and "
                "evicted=Drop()"
            )
        if policy.budget != 1 and not policy.allocate.even:
            raise PolicyError(
                f"{name} needs the same number of slots in every layer and head, but allocate={policy.allocate}: use "
                "Uniform(), or a budget of 1"
            )

    def layer_rooms(
        self, policy: Parts, budget: SlotBudget, windows: tuple[int | None, ...], length: int
    ) -> tuple[int, ...]:
        most = policy.budget.count if isinstance(policy.budget, Tokens) else -(-budget.total(length) // budget.layers)
        return (int(align(min(most, length))),) * len(windows)

    def remember(self, policy: Parts, prompt: Prompt) -> SlotNotes:
        """See `DecodingRule.remember`: what was noted, slot by slot."""
        assert prompt.rooms is not None
        layers, batch, length = prompt.noted.shape
        positions = prompt.context.positions
        of_slots = np.repeat(np.arange(layers), prompt.rooms)
        layer = jnp.asarray(np.pad(of_slots, (0, positions.shape[2] - len(of_slots))), jnp.int32)
        noted = jnp.moveaxis(prompt.noted, 0, 1).reshape(batch, 1, layers * length)
        index = (layer * length)[None, None] + jnp.clip(positions, 0, length - 1)
        values = jnp.take_along_axis(jnp.broadcast_to(noted, (*positions.shape[:2], layers * length)), index, axis=2)
        return SlotNotes(split(jnp.where(positions >= 0, values, 0)), prompt.rooms)

    def weighed(self, state: KVState, kernels: Kernels, weigh: Weigh) -> Step:
        """A step that appends to the tail and attends with weights of one's own.

        Args:
          state, kernels: as in `attend`.
          weigh: (logits f32 [batch, kv_heads, group, n], whether there is a token in each of the n slots, bool
            [batch, 1 or kv_heads, 1, n], what was noted of the first `room` of them, which are the prompt's, f32
            [batch, kv_heads, 1, room], the layer i32 []) -> weights like the logits.
        """
        context, tail, notes = state.context, state.tail, state.observed
        assert isinstance(notes, SlotNotes)
        room, capacity = max(notes.rooms), tail.capacity
        starts = jnp.asarray(np.cumsum((0, *notes.rooms[:-1])), jnp.int32)
        slot, count = jnp.minimum(tail.length, capacity - 1), tail.length + 1

        def attend(query, key, value, pools, layer):
            pools = ops.append(kernels, pools, (key[:, 0], value[:, 0]), layer * capacity + slot)
            old = (context.keys, context.values, notes.values)
            keys, values, noted = (jax.lax.dynamic_slice_in_dim(x, starts[layer], room, axis=2) for x in old)
            new = (jax.lax.dynamic_slice_in_dim(x, layer * capacity, capacity, axis=2) for x in pools)
            keys, values = (jnp.concatenate(x, axis=2) for x in zip((keys, values), new))
            held = context.lengths[:, layer][..., None]
            inside = jnp.concatenate(
                [
                    jax.lax.iota(jnp.int32, room)[None, None] < held,
                    jnp.broadcast_to(
                        jax.lax.iota(jnp.int32, capacity)[None, None] < count[:, None, None],
                        (*held.shape[:2], capacity),
                    ),
                ],
                axis=2,
            )[:, :, None]
            batch, kv_heads, _, head_dim = keys.shape
            q = query[:, 0].reshape(batch, kv_heads, -1, head_dim)
            logits = head_dim**-0.5 * jnp.einsum("bhgd,bhsd->bhgs", q, keys, preferred_element_type=jnp.float32)
            weights = weigh(jnp.where(inside, logits, -jnp.inf), inside, noted[:, :, None], layer)
            values = jnp.where(inside[:, :, 0, :, None], values, 0)  # 0 * NaN would be NaN
            out = jnp.einsum(
                "bhgs,bhsd->bhgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
            )
            return out.reshape(batch, 1, -1, head_dim), pools, None

        def close(pools: Any) -> KVState:
            return dataclasses.replace(state, tail=dataclasses.replace(tail, keys=pools[0], values=pools[1]))

        return Step(attend, (tail.keys, tail.values), close)
