"""`Evict`: prompt and generated tokens in one cache of fixed size, from which every step evicts the weakest token.

    context.keys[b, h]   | layer 0: t t t t t t . . free | layer 1: t t t t t . . . free | ...
                           <-----------> lengths           <-- capacity for each layer -->

A layer holds C tokens between two steps and C + 1 within one, its own included. The token that a step gives up is
overwritten by the next: it lies in the store until then, and nothing reads it. A layer with a window holds that, in the
same way: C is one less than the window, and the oldest token is the weakest.
"""

import dataclasses
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
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.policies.budget import Bytes, Tokens
from vlcache_jax.policies.decoding.rule import Prompt, Step, WeighingRule, named
from vlcache_jax.policies.parts import Parts
from vlcache_jax.policies.shares import SlotBudget
from vlcache_jax.policies.window import forced
from vlcache_jax.typing import ModelSpec


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SlotWeights:
    """What `Evict` knows of the tokens in the context.

    Attributes:
      scores: f32 [batch, lanes, slots]. Attention received by the token of each slot.
      sizes: i32 [batch, layers]. Tokens a layer holds between two steps.
      rooms: slots of each layer in the context (static).
    """

    scores: jax.Array
    sizes: jax.Array
    rooms: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def partition_specs(self) -> "SlotWeights":
        """See `PackedStore.partition_specs`."""
        spec = lanes_spec(*self.scores.shape[:2])
        return SlotWeights(spec, PartitionSpec(spec[0]), self.rooms)  # type: ignore[arg-type]


@named("evict", methods="h2o, tova and streaming_llm")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Evict(WeighingRule):
    """Prompt and generated tokens share one cache of C slots per layer and KV head; the weakest makes room.

    C is the layer's share of the budget: for a fraction, of the row's own prompt; for `Tokens`, that many, and a
    shorter prompt leaves slots free. A step appends its token, attends to all tokens held, C and its own, weighs
    them, and then C stay: the latest ones, the sinks, and the best weights; what is gone is gone.

    Attributes:
      weigh: "sum": attention from all rows so far, the prompt's included (H2O); "last": from the latest row (TOVA).
      heads: "each" averages a weight over the query heads of a KV head; "shared" over all of the layer, so that all
        KV heads hold the same tokens.
      recent: the window of latest tokens, as in `Policy`, of C slots; None for the policy's. At least the newest.
      sinks: the prompt's first tokens; None for the policy's.

    Raises:
      PolicyError: a value that is not known; as a policy's rule also: an allocation that is not `Uniform`, a budget in
        bytes, a quantised store, evicted tokens that are not dropped, a protected kind, a score that is not attention
        ("sum"), or not one for all heads ("shared").
    """

    weigh: str = "sum"
    heads: str = "each"

    def __post_init__(self) -> None:
        if self.weigh not in ("sum", "last"):
            raise PolicyError(f"Evict(weigh={self.weigh!r}) is not known: use 'sum' or 'last'")
        if self.heads not in ("each", "shared"):
            raise PolicyError(f"Evict(heads={self.heads!r}) is not known: use 'each' or 'shared'")
        super().__post_init__()

    def check_windows(self, largest: int) -> None:
        """See `DecodingRule.check_windows`."""

    def layer_rooms(
        self, policy: Parts, budget: SlotBudget, windows: tuple[int | None, ...], length: int
    ) -> tuple[int, ...]:
        """See `DecodingRule.layer_rooms`: C, one more, and alignment; or the window, to which a short prompt grows."""
        most = policy.budget.count if isinstance(policy.budget, Tokens) else -(-budget.total(length) // budget.layers)
        return tuple(int(align(window or most + 1)) for window in windows)

    def remember(self, policy: Parts, prompt: Prompt) -> SlotWeights:
        """See `DecodingRule.remember`: the weights of what was kept of the prompt, which the prefill's scores are."""
        assert prompt.rooms is not None
        assert prompt.scores is not None
        assert prompt.order is not None
        _, batch, _, entries = prompt.scores.shape
        _, lanes, slots = prompt.context.positions.shape
        most = max(prompt.rooms)
        order = jnp.minimum(prompt.order[..., :most], entries - 1)
        kept = jnp.take_along_axis(prompt.scores, order, axis=3)
        kept = jnp.pad(kept, [(0, 0)] * 3 + [(0, most - kept.shape[3])])
        kept = jnp.concatenate([of_layer[..., :room] for of_layer, room in zip(kept, prompt.rooms)], axis=2)
        kept = jnp.pad(kept, [(0, 0)] * 2 + [(0, slots - kept.shape[2])])
        kept = split(jnp.broadcast_to(kept, (batch, lanes, slots)).astype(jnp.float32))
        sizes = prompt.requested
        if isinstance(policy.budget, Tokens):
            sizes = jnp.full_like(sizes, policy.budget.count)
        window = jnp.asarray([window or 0 for window in prompt.windows], jnp.int32)
        return SlotWeights(kept, jnp.where(window > 0, window - 1, sizes), prompt.rooms)

    def tail_tokens(self, max_new_tokens: int) -> int:
        return 0

    def check(self, policy: Parts) -> None:
        name = f"{policy.name}: Evict"
        if not policy.allocate.even:
            raise PolicyError(
                f"{name} needs the same number of slots in every layer and head, but allocate={policy.allocate}: use "
                "Uniform(), or Recompress(), which works with every allocation"
            )
        if policy.bits is not None or policy.evicted.saves:
            raise PolicyError(
                f"{name} rewrites single slots, but bits={policy.bits} and evicted={policy.evicted}: use bits=None and "
                "evicted=Drop()"
            )
        if isinstance(policy.budget, Bytes):
            raise PolicyError(f"{name} cannot count budget={policy.budget}: give a fraction, or tokens a layer")
        if policy.protect is not None:
            raise PolicyError(f"{name} weighs by attention alone, but protect={policy.protect!r}: use protect=None")
        if self.weigh == "sum" and not policy.score.needs_attention:
            raise PolicyError(f"{name}(weigh='sum') starts from attention, but score={policy.score}: use weigh='last'")
        if getattr(policy.score, "normalised", False):
            raise PolicyError(f"{name} adds up attention, but the score is normalised: use normalised=False")
        if self.heads == "shared" and getattr(policy.score, "heads", None) != "shared":
            raise PolicyError(
                f"{name}(heads='shared') needs one ranking of the prompt for all heads, but score={policy.score}: use "
                "AccumulatedAttention('shared')"
            )
        super().check(policy)

    def attend(self, state: KVState, kernels: Kernels, spec: ModelSpec) -> Step:
        """See `DecodingRule.attend`.

        A layer's slice of the store is read, changed and written back: the store is rewritten once a step, in place.
        Writes at a slot of its own for every row and KV head would make the compiler copy all of it.
        """
        context, weights = state.context, state.observed
        assert isinstance(weights, SlotWeights)
        room = max(weights.rooms)  # of a layer with fewer slots, the next one's are carried along
        starts = np.cumsum((0, *weights.rooms[:-1]))
        recent, sinks = self.forced
        held = jnp.minimum(context.lengths[..., 0] + 1, weights.sizes + 1)  # within the step
        here = state.next_index[:, None, None]

        def attend(query, key, value, carry, layer):
            start = layer * room
            if spec.windows:
                start = jnp.asarray(starts, jnp.int32)[layer]
            keys, values, positions, scores = (
                jax.lax.dynamic_slice_in_dim(x, start, room, axis=2) for x in carry
            )  # [batch, kv_heads, room, ...]
            batch, kv_heads, _, head_dim = keys.shape
            length, size, count = (x[:, layer, None, None] for x in (context.lengths[..., 0], weights.sizes, held))

            latest, first = forced(size, recent, sinks)
            weak = (
                (jax.lax.iota(jnp.int32, room)[None, None] < length)
                & (positions < here - latest)
                & (positions >= first)
            )
            ranks = scores
            if spec.windows:  # a layer with one gives up its oldest token
                windowed = jnp.asarray([window is not None for window in spec.windows])[layer]
                weak = jnp.where(windowed, jax.lax.iota(jnp.int32, room)[None, None] < length, weak)
                ranks = jnp.where(windowed, positions.astype(jnp.float32), scores)
            lowest = jnp.min(jnp.where(weak, ranks, jnp.inf), axis=2, keepdims=True)
            weakest = jnp.where(weak & (ranks <= lowest), positions, -1)
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
            if self.heads == "shared":
                received = jnp.broadcast_to(jnp.mean(received, axis=1, keepdims=True), received.shape)
            old = jnp.where(new, 0, scores) if self.weigh == "sum" else 0
            scores = jnp.where(inside, old + received, scores)

            carry = tuple(
                split(jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=2))
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

        return Step(attend, (context.keys, context.values, context.positions, weights.scores), close)
