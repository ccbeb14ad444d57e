"""What a run kept and what it cost, counted from the real buffers."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from vlcache_jax.cache.geometry import window_rooms
from vlcache_jax.cache.state import Allocation, KVState
from vlcache_jax.cache.store import PackedStore
from vlcache_jax.files.exporting import exportable
from vlcache_jax.inputs import Array
from vlcache_jax.parallel.mesh import automatic, free_axes, on_every_process, on_mesh_of
from vlcache_jax.parallel.replication import replicated, warn
from vlcache_jax.patterns.attending import dense_layers, why_dense
from vlcache_jax.patterns.listing import Told
from vlcache_jax.patterns.pattern import Pattern
from vlcache_jax.policies.budget import Budget
from vlcache_jax.policies.policy import Policy
from vlcache_jax.pruning.plan import Plan
from vlcache_jax.typing import ModelSpec


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class PrefillReport:
    """What a sparse prefill looked at.

    Attributes:
      density: f32 [batch, layers], listed blocks / the blocks of causal attention, on average over heads; 1 in dense
        layers. A single column counts for a part of a block wherever queries see it.
      overflow: i32 [batch, layers], blocks and single columns that the pattern wanted and its lists had no room for.
      pattern: its name (static).
      dense_layers: numbers of the layers that ran dense (static).
      why: why all of them did, if they did; None otherwise (static).
    """

    density: jax.Array
    overflow: jax.Array
    pattern: str = dataclasses.field(metadata={"static": True})
    dense_layers: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    why: str | None = dataclasses.field(default=None, metadata={"static": True})


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """A pytree, so that `generate` can return it from inside `jit`.

    Attributes:
      kept: i32 [batch, layers]. Prompt tokens kept in each layer (of the KV head that kept most), without
        those kept besides at a lower precision (`Policy.evicted`).
      prompt_lengths: i32 [batch].
      density: f32 [batch, layers]. Share of attention entries above the threshold; 1 where it was not measured, NaN
        where the scores are not finite.
      exact: bool [batch]. False where a layer got more slots than it had handed on candidates.
      kept_fraction: f32 [batch]. Kept slots of all layers and KV heads / (layers * KV heads * prompt length); layers
        with a window (`ModelSpec.windows`), which hold nothing to evict, are left out.
      policy: the policy's name (static).
      budget: the policy's budget (static).
      state_bytes: bytes of the buffers of the context and of what is kept at a lower precision (static).
      full_bytes: bytes of the context's buffers for the same padded prompts without compression (static).
      tail_bytes: bytes of the buffers for generated tokens, and of what their rule remembers (static). With `Evict` the
        context holds them, too.
      replicated: what every device of the mesh holds as a whole although an axis could split it, with the remedy
        (static); as far as the program knows its mesh: inside `jit`, enter it with `jax.set_mesh`.
      finite: bool, of the shape of the answers' lengths; [batch] without answers. False where a score or a logit was
        NaN or infinite: such an answer means nothing. Outside `jit` that is a `NonFiniteError`.
      stage_tokens: i32 [batch, stages]. The tokens that the layers of each stage had; one stage, with the whole prompt,
        unless visual tokens are dropped between layers (`pruning`).
      prefill: what the queries of the prompt looked at, where a pattern was given; None without.
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
    replicated: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    finite: jax.Array | None = None
    stage_tokens: jax.Array | None = None
    prefill: PrefillReport | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes of all buffers that an answer needs: `state_bytes` and `tail_bytes`."""
        return self.state_bytes + self.tail_bytes

    def with_prefill(self, pattern: Pattern, told: Told, spec: ModelSpec, plan: Plan) -> "Report":
        """The report of a prefill by a pattern; `told` is of all layers, [layers, batch] each."""
        dense: list[int] = []
        for start, size, room in zip(plan.starts, plan.sizes(spec.num_layers), plan.rooms):
            are_dense = dense_layers(pattern, spec, room)
            dense += [layer for layer in range(start, start + size) if are_dense[layer]]
        why = why_dense(pattern, plan.rooms[0])
        density, overflow = (x.swapaxes(0, 1) for x in told)
        return dataclasses.replace(self, prefill=PrefillReport(density, overflow, pattern.name, tuple(dense), why))

    def of_answers(self, state: KVState, finite: jax.Array | None = None) -> "Report":
        """The report of a context's answers, which began with `state`."""
        tail_bytes = sum(x.nbytes for x in jax.tree.leaves((state.tail, state.observed)))
        return dataclasses.replace(self, tail_bytes=tail_bytes, finite=state.finite if finite is None else finite)


def make_report(
    spec: ModelSpec,
    policy: Policy,
    stores: Sequence[PackedStore],
    allocation: Allocation,
    prompt_lengths: Array,
    padded: int,
    finite: jax.Array,
    stage_tokens: jax.Array,
) -> Report:
    """The report of what was kept of prompts padded to `padded` tokens, without answers."""
    with on_mesh_of(stores):
        kept, exact, kept_fraction = _counted(stores[0].lengths, allocation.requested, prompt_lengths, spec.full_layers)
        whole = replicated(free_axes(), spec, rows=kept.shape[0], lanes=policy.shared_lanes, policy=policy.name)
    warn(whole)
    report = Report(
        kept=kept,
        prompt_lengths=jnp.asarray(prompt_lengths),
        density=allocation.density,
        exact=exact,
        kept_fraction=kept_fraction,
        policy=policy.name,
        budget=policy.budget,
        state_bytes=sum(store.nbytes for store in stores),
        full_bytes=full_cache_bytes(spec, kept.shape[0], padded),
        tail_bytes=0,
        replicated=whole,
        finite=finite,
        stage_tokens=stage_tokens,
    )
    return on_every_process(report)


@partial(jax.jit, static_argnames="full_layers")
@automatic
def _counted(
    slots: jax.Array, requested: jax.Array, prompt_lengths: jax.Array, full_layers: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    """(kept, exact, kept_fraction) from slots [batch, layers, kv_heads or 1], requested and there."""
    requested = requested.reshape(*requested.shape[:2], -1)
    exact = jnp.all(slots >= requested, axis=(1, 2))
    kept = jnp.max(slots, axis=2)
    if 0 < len(full_layers) < slots.shape[1]:
        slots = slots[:, jnp.asarray(full_layers)]
    of_all = (slots[0].size * prompt_lengths).astype(jnp.float32)
    return kept, exact, jnp.sum(slots, axis=(1, 2)).astype(jnp.float32) / of_all


def full_cache_bytes(spec: ModelSpec, batch: int, padded: int) -> int:
    """Bytes of the context's buffers without compression, for prompts padded to `padded` tokens."""
    slots = batch * spec.num_kv_heads * sum(window_rooms(spec.layer_windows, padded))
    slot_bytes = 2 * spec.head_dim * jnp.dtype(spec.dtype).itemsize + 4  # key and value, position
    return slots * slot_bytes + 2 * 4 * batch * spec.num_layers  # offsets, lengths
