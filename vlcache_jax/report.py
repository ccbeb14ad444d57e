"""What a run kept and what it cost, counted from the real buffers."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.batch import Array
from vlcache_jax.budgets import Budget
from vlcache_jax.interfaces import ModelSpec
from vlcache_jax.policies.base import Policy
from vlcache_jax.state import KVState, align


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """A pytree, so that `generate` can return it from inside `jit`.

    Attributes:
      kept: i32 [batch, layers]. Prompt tokens kept in each layer (of the KV head that kept most), without
        those kept besides at a lower precision (`Policy.evicted`).
      prompt_lengths: i32 [batch].
      density: f32 [batch, layers]. Share of attention entries above the threshold; 1 where it was not measured.
      exact: bool [batch]. False where a layer got more slots than it had handed on candidates.
      kept_fraction: f32 [batch]. Kept slots of all layers and KV heads / (layers * KV heads * prompt length).
      policy: the policy's name (static).
      budget: the policy's budget (static).
      state_bytes: bytes of the buffers of the context and of what is kept at a lower precision (static).
      full_bytes: bytes of the context's buffers for the same padded prompts without compression (static).
      tail_bytes: bytes of the buffers for generated tokens, and of what their rule remembers (static). With `Evict` the
        context holds them, too.
    """

    kept: jax.Array
    prompt_lengths: jax.Array
    density: jax.Array
    exact: jax.Array
    kept_fraction: jax.Array
    policy: str = dataclasses.field(metadata={"static": True})
    budget: Budget = dataclasses.field(metadata={"static": True})
    state_bytes: int = dataclasses.field(metadata={"static": True})
    full_bytes: int = dataclasses.field(metadata={"static": True})
    tail_bytes: int = dataclasses.field(metadata={"static": True})

    @property
    def held_bytes(self) -> int:
        """Bytes of all buffers that an answer needs: `state_bytes` and `tail_bytes`."""
        return self.state_bytes + self.tail_bytes


def make_report(spec: ModelSpec, policy: Policy, state: KVState, prompt_lengths: Array, padded: int) -> Report:
    """The report of a state as prefill returned it, for prompts padded to `padded` tokens."""
    slots, requested = state.context.lengths, state.allocation.requested  # [batch, layers, kv_heads or 1]
    requested = requested.reshape(*requested.shape[:2], -1)
    kept, prompt_lengths = jnp.max(slots, axis=2), jnp.asarray(prompt_lengths)
    return Report(
        kept=kept,
        prompt_lengths=prompt_lengths,
        density=state.allocation.density,
        exact=jnp.all(slots >= requested, axis=(1, 2)),
        kept_fraction=jnp.sum(slots, axis=(1, 2)) / (slots[0].size * prompt_lengths),
        policy=policy.name,
        budget=policy.budget,
        state_bytes=sum(store.nbytes for store in state.stores),
        full_bytes=full_cache_bytes(spec, kept.shape[0], padded),
        tail_bytes=sum(x.nbytes for x in jax.tree.leaves((state.tail, state.observed))),
    )


def full_cache_bytes(spec: ModelSpec, batch: int, padded: int) -> int:
    """Bytes of the context's buffers without compression, for prompts padded to `padded` tokens."""
    slots = batch * spec.num_kv_heads * spec.num_layers * int(align(padded))
    slot_bytes = 2 * spec.head_dim * jnp.dtype(spec.dtype).itemsize + 4  # key and value, position
    return slots * slot_bytes + 2 * 4 * batch * spec.num_layers  # offsets, lengths
