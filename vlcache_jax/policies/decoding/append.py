"""`Append`: every generated token is kept, in the tail."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.cache.state import KVState
from vlcache_jax.kernels.decode_attention import Segments, Store
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.policies.decoding.rule import DecodingRule, Step, named
from vlcache_jax.typing import ModelSpec


@named("append")
@dataclasses.dataclass(frozen=True)
class Append(DecodingRule):
    """All of them, at full precision, never evicted: the tail has room for `max_new_tokens`."""

    unlimited = False

    def check_windows(self, largest: int) -> None:
        """See `DecodingRule.check_windows`."""

    def tail_tokens(self, max_new_tokens: int) -> int:
        return max_new_tokens

    def attend(self, state: KVState, kernels: Kernels, spec: ModelSpec) -> Step:
        slot = jnp.minimum(state.tail.length, state.tail.capacity - 1)  # a row that is full writes over its own last
        return appending(state, kernels, spec, slot, state.tail.length + 1)


APPEND = Append()


def appending(
    state: KVState,
    kernels: Kernels,
    spec: ModelSpec,
    slot: jax.Array,
    count: jax.Array,
    note: Callable[[Any, jax.Array, jax.Array, jax.Array], Any] | None = None,
    ring: tuple[int, jax.Array] | None = None,
) -> Step:
    """A step that writes each row's token to the tail, and attends to the read-only stores and the tail.

    Args:
      state: before the step.
      kernels: which implementations to use.
      spec: of the model, whose windows move on where the tail is in order.
      slot: i32 [batch], where in a layer's segment of the tail each row writes.
      count: i32 [batch], how many slots of the segment it then reads.
      note: (observed, query [batch, heads, head_dim], lse f32 [batch, heads], layer) -> observed, for a rule that
        remembers something of every step.
      ring: (tokens, generated i32 [batch]) of a rule whose tail is a ring of so many slots a layer, at least the
        largest window, after so many generated tokens, the step's own included; None where it is in order.
    """
    tail = state.tail

    def attend(query, key, value, carry, layer):
        pools, observed = carry
        start = layer * tail.capacity
        pools = ops.append(kernels, pools, (key[:, 0], value[:, 0]), start + slot)
        since, runs = None, [(jnp.zeros_like(count), count)]  # of the tail: first slot, slots
        if spec.windows:  # a layer with a window sees nothing before `since`, be it of the prompt or of the answer
            window = jnp.asarray([w or spec.max_positions for w in spec.windows], jnp.int32)[layer]
            since, passed = state.next_index + 1 - window, jnp.clip(count - window, 0, None)
            runs = [(passed, count - passed)]
            if ring is not None:  # the latest up to this slot, and those before them at the ring's end
                windowed = jnp.asarray([w is not None for w in spec.windows])[layer]
                seen = jnp.where(windowed, jnp.minimum(window, ring[1]), count)
                here = jnp.minimum(seen, slot + 1)
                runs = [(slot + 1 - here, here), (ring[0] - (seen - here), seen - here)]
        new = [Segments((start + first)[:, None], held[:, None]) for first, held in runs]
        parts = [
            *(store.layer(layer, since) for store in state.stores),
            *((Store(pools[0], pools[1], segments=spec.num_layers), run) for run in new),
        ]
        out, lse = ops.union_attention(kernels, query[:, 0], parts)
        if note is not None:
            observed = note(observed, query[:, 0], lse, layer)
        return out[:, None], (pools, observed), None

    def close(carry: Any) -> KVState:
        (keys, values), observed = carry
        return dataclasses.replace(state, tail=dataclasses.replace(tail, keys=keys, values=values), observed=observed)

    return Step(attend, ((tail.keys, tail.values), state.observed), close)
