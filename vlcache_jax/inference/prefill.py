"""Prefill: one program from a batch of prompts to a context, the next token's logits and the compressed cache.

embed -> scan over layers (attention, statistics, candidates) -> allocate -> select -> pack
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.cache.geometry import align, capacity, regular_slots, segment_alignment
from vlcache_jax.cache.merging import merge_evicted
from vlcache_jax.cache.packing import empty_codes, pack, quantise_into, value_channels
from vlcache_jax.cache.selection import candidates, protected_first, select_layers
from vlcache_jax.cache.state import Allocation
from vlcache_jax.cache.store import PackedStore, split
from vlcache_jax.inference.context import Context
from vlcache_jax.inference.finiteness import finite_rows, require_finite
from vlcache_jax.inference.report import make_report
from vlcache_jax.inference.validation import check_prefill
from vlcache_jax.inputs import Batch
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.mesh import automatic, by_row, on_mesh_of, refuse_partly_checked
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.placing import placed
from vlcache_jax.policies.decoding.evict import SlotWeights, layer_room, slot_weights
from vlcache_jax.policies.decoding.recompress import RecentQueries, no_queries
from vlcache_jax.policies.decoding.rules import Evict, Recompress
from vlcache_jax.policies.evicted.rules import Merge, Quantise
from vlcache_jax.policies.methods.full_cache import FullCache
from vlcache_jax.policies.policy import Policy
from vlcache_jax.policies.scores.attention import LayerInputs
from vlcache_jax.policies.shares import slot_budget
from vlcache_jax.policies.window import forced, settled
from vlcache_jax.typing import ModelSpec, Params, VisionLanguageModel


def prefill(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    policy: Policy | None = None,
    *,
    kernels: Kernels | None = None,
) -> Context:
    """`compress` that waits for nothing and raises nothing about numbers: `report.finite` tells.

    Pure, and compiled once per (shapes, policy).

    Differentiable: the logits are those of the model's `forward`, and so are their derivatives. Kept keys and values
    have theirs where they are stored as they were computed; which tokens are kept, quantised and merged stores, and all
    that is reported, are constants.

    Args:
      model: a Flax module such as `vlm.model`.
      params: its parameters, a nested dict.
      batch: prompts, right-padded.
      policy: what to keep; `FullCache()` by default.
      kernels: which implementations to use; the platform's best by default.

    Returns:
      The context, of as many rows as the batch. Scores or logits that are not finite show in `report.finite`, and
      `report.density` is NaN in a layer whose scores are not, or, where evicted tokens are merged, whose keys or values
      are not.

    Raises:
      InputError: a malformed batch, or more positions than the model has (lengths are checked only outside `jit`, where
        they are known).
      PolicyError: a budget in bytes that holds less than one token a layer, or lanes that do not divide the KV heads.

    Example:
      logits, state = vlc.prefill(vlm.model, vlm.params, batch, policy).start(max_new_tokens=64)
    """
    return run_prompts(model, params, batch, policy, 1, kernels)


def compress(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    policy: Policy | None = None,
    *,
    kernels: Kernels | None = None,
) -> Context:
    """Runs prompts and keeps of their cache what the policy says, without room for answers. Pure, like `prefill`.

    A prompt may end anywhere. Where it ends before the question, choose a policy that needs none (docs/contexts.md).

    Args:
      model: a Flax module such as `vlm.model`.
      params: its parameters.
      batch: prompts, from `vlm.processor`.
      policy: what to keep; `FullCache()` by default.
      kernels: which implementation of each op to use; the platform's best by default.

    Returns:
      The context, of as many rows as the batch.

    Raises:
      InputError, PolicyError: see `prefill`.
      NonFiniteError: scores or logits that are not finite, once all has run; see `generate`.

    Example:
      ctx = vlc.compress(vlm.model, vlm.params, batch, vlc.KeyDifference(budget=0.2))
    """
    ctx = run_prompts(model, params, batch, policy, 1, kernels)
    finite, density = ctx.report.finite, ctx.report.density
    require_finite(finite, ctx, dtype=model.spec.dtype, before=finite, density=density, policy=policy or FullCache())
    return ctx


def run_prompts(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    policy: Policy | None,
    max_new_tokens: int,
    kernels: Kernels | None,
) -> Context:
    """`prefill`, if `max_new_tokens` have their place, too."""
    policy = FullCache() if policy is None else policy
    check_prefill(model.spec, batch, policy, max_new_tokens)
    if not policy.keeps_all:
        refuse_partly_checked()
    batch = placed(batch, params)
    with on_mesh_of(params, batch):
        ran = _prefill(model, params, batch, policy, kernels or Kernels())
    logits, stores, lengths, allocation, finite, observed = ran
    report = make_report(model.spec, policy, stores, allocation, lengths, batch.length, finite)
    return Context(
        model=model,
        params=params,
        stores=stores,
        next_position=lengths,
        logits=logits,
        allocation=allocation,
        report=report,
        decoding=policy.rule,
        observed=observed,
    )


@partial(jax.jit, static_argnames=("model", "policy", "kernels"))
@automatic
def _prefill(
    model: VisionLanguageModel, params: Params, batch: Batch, policy: Policy, kernels: Kernels
) -> tuple[jax.Array, tuple[PackedStore, ...], jax.Array, Allocation, jax.Array, Any]:
    """(logits, stores, lengths, allocation, whether all was finite, what the rule of generated tokens remembers)."""
    variables = {"params": params}
    hidden = model.apply(variables, batch, method="embed")
    lengths = varying(jnp.asarray(batch.lengths), params, batch)
    positions = jnp.minimum(jax.lax.iota(jnp.int32, batch.length)[None], lengths[:, None] - 1)
    run = partial(model.apply, variables, hidden, positions, method="decode")
    fill = _keep_all if policy.keeps_all else _compress
    rotate = partial(model.apply, {}, method="rotate")
    hidden, stores, allocation, observed = fill(run, rotate, model.spec, batch, lengths, policy, kernels)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    logits = model.apply(variables, last, method="unembed")
    finite = finite_rows(logits) & jnp.all(jnp.isfinite(allocation.density), axis=1)
    return logits, tuple(stores), lengths, allocation, finite, observed


def _evicts(policy: Policy) -> bool:
    return isinstance(policy.rule, Evict)


def _keep_all(
    run: Any, rotate: Any, spec: ModelSpec, batch: Batch, lengths: jax.Array, policy: Policy, kernels: Kernels
) -> tuple[jax.Array, list[PackedStore], Allocation, None]:
    """All tokens: each layer writes its segment of the pool in place."""
    layers, bits = spec.num_layers, policy.bits
    room = int(align(batch.length, segment_alignment(bits)))

    def attend(query, key, value, pools, layer):
        out, _ = ops.attention(kernels, query, key, value, lengths, with_lse=False)
        if bits is not None:
            key, value = jax.lax.stop_gradient((key, value))  # integers have no derivative
            channels = value_channels(value, lengths)
            return out, write(pools, key, value.astype(jnp.float32) / channels[:, None], layer), channels
        pools = tuple(
            split(jax.lax.dynamic_update_slice_in_dim(pool, x.swapaxes(1, 2).astype(pool.dtype), layer * room, axis=2))
            for pool, x in zip(pools, (key, value))
        )
        return out, pools, None

    def write(pools, key, value, layer):
        assert bits is not None
        pad = [(0, 0), (0, 0), (0, room - batch.length), (0, 0)]
        key, value = (jnp.pad(x.swapaxes(1, 2), pad) for x in (key, value))
        valid = (jax.lax.iota(jnp.int32, room)[None] < lengths[:, None])[:, None]

        def read(start, size):
            return tuple(jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (key, value, valid))

        return tuple(split(x) for x in quantise_into(pools, read, layer * room, room, bits))

    shape = (batch.size, spec.num_kv_heads, regular_slots(layers, room), spec.head_dim)
    pools = empty_codes(shape, bits) if bits is not None else [jnp.zeros(shape, spec.dtype)] * 2
    pools = varying(tuple(split(x) for x in pools), lengths)
    hidden, (keys, values, *scales), channels = run(attend, pools, jax.lax.iota(jnp.int32, layers))
    of_codes = dict(zip(("key_scales", "value_scales"), scales))
    if channels is not None:
        of_codes["value_channels"] = channels.swapaxes(0, 1)
    context = PackedStore.regular(keys, values, lengths, layers, room, **of_codes)
    kept = jnp.broadcast_to(lengths[:, None], (batch.size, layers))
    return hidden, [context], Allocation(requested=kept, density=jnp.ones(kept.shape, jnp.float32)), None


def _compress(
    run: Any, rotate: Any, spec: ModelSpec, batch: Batch, lengths: jax.Array, policy: Policy, kernels: Kernels
) -> tuple[jax.Array, list[PackedStore], Allocation, SlotWeights | RecentQueries | None]:
    """Attention, scores and candidates layer by layer; then budgets, selection and packing for all layers at once."""
    layers, length = spec.num_layers, batch.length
    allocate = policy.sharing
    lanes = policy.lanes if allocate.per_head else None
    budget = slot_budget(policy.budget, spec, lanes, policy.bits)
    count = max(1, floor_fraction(length, policy.candidate_fraction))
    threshold = allocate.threshold
    quantised = policy.bits is not None or isinstance(policy.evicted, Quantise)
    measure = threshold is not None or policy.score.needs_attention
    first, rows = policy.rows.span(lengths, batch.vision_mask)
    rule = policy.rule
    noted = rule.scoring_rows if isinstance(rule, Recompress) else 0
    mean = jnp.asarray(budget.total(lengths)) // layers
    recent = settled(policy.recent, mean)
    window = None if isinstance(recent, int | float) else jnp.maximum(1, recent)
    number = rows.astype(jnp.float32)
    pairs = number * (first.astype(jnp.float32) + (number + 1) / 2)  # (q, j), j <= q, q in first .. first + rows - 1

    def attend(query, key, value, carry, layer):
        out, lse = ops.attention(kernels, query, key, value, lengths, with_lse=measure and threshold is None)
        seen = tuple(jax.lax.stop_gradient(x) for x in (query, key, value))  # what is kept has no derivative
        statistics, density = None, jnp.ones((batch.size,), jnp.float32)
        if measure:
            bounds = {"threshold": threshold, "max_rows": policy.rows.most}
            statistics = ops.column_statistics(
                kernels, seen[0], seen[1], first, rows, jax.lax.stop_gradient(lse), **bounds
            )
            if statistics.counts is not None:
                density = jnp.mean(statistics.counts, axis=1) / pairs
        inputs = LayerInputs(
            query=seen[0],
            key=seen[1],
            value=seen[2],
            lengths=lengths,
            vision_index=jnp.asarray(batch.vision_index),
            layer=layer,
            density=density,
            rows=rows,
            statistics=statistics,
            window=window,
            rotate=rotate,
        )
        scores, ties = policy.score(inputs), policy.score.ties(inputs)
        finite = jnp.all(
            jnp.isfinite(scores) | ~inputs.valid[:, None], axis=2
        )  # of each head: those are apart on a mesh
        if isinstance(policy.evicted, Merge):  # a token that is not a number would spoil all those it is merged with
            sound = jnp.isfinite(key).all(axis=3) & jnp.isfinite(value).all(axis=3)
            finite &= jnp.all(sound | ~inputs.valid[..., None], axis=1)
        measured = allocate.measure(inputs, scores)
        if policy.protect is not None:
            scores = protected_first(scores, lengths, inputs.vision_mask == (policy.protect == "vision"), ties)
            ties = None  # the ranks have none
        positions = jnp.broadcast_to(jax.lax.iota(jnp.int32, length), (batch.size, 1, length))
        channels = value_channels(value, lengths) if quantised else None
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if count < length:
            wanted = jnp.full_like(lengths, count)
            positions = candidates(scores, lengths, count, *forced(wanted, recent, policy.sinks), ties)
            ties = None if ties is None else jnp.take_along_axis(ties, positions, axis=2)
            scores = jnp.take_along_axis(scores, positions, axis=2)
            key, value = (jnp.take_along_axis(x, positions[..., None], axis=2) for x in (key, value))
        room = jnp.zeros((batch.size, query.shape[2], noted, spec.head_dim), spec.dtype)  # for generated queries
        return out, carry, (key, value, scores, ties, positions, channels, (density, finite), measured, room)

    hidden, _, layer_outputs = run(attend, None, jax.lax.iota(jnp.int32, layers))
    keys, values, scores, ties, positions, channels, (density, finite), measured, queries = layer_outputs
    density = jnp.where(jnp.all(finite, axis=2), density, jnp.nan)
    measured = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), measured)

    def share(measured, lengths):
        return allocate.slots(measured, lengths, budget)  # [batch, layers], or [batch, layers, kv_heads]

    requested = (share if lanes else by_row(share, batch.size))(measured, lengths)
    most = jnp.expand_dims(jnp.minimum(count, lengths), range(1, requested.ndim))
    slots = jnp.swapaxes(jnp.minimum(requested, most), 0, 1)

    latest, earliest = jax.vmap(lambda slots: forced(slots, recent, policy.sinks))(slots)
    splits = isinstance(policy.evicted, Quantise)
    order, others = select_layers(scores, positions, lengths, slots, latest, earliest, ties, rest=splits)
    keys, values = keys.astype(spec.dtype), values.astype(spec.dtype)
    if isinstance(policy.evicted, Merge):
        keys, values = jax.lax.stop_gradient((keys, values))  # which token goes where is a search of its own
        keys, values = merge_evicted(keys, values, order, lengths, policy.evicted.kind)
        positions, order = (
            order,
            jnp.broadcast_to(jax.lax.iota(jnp.int32, length), order.shape),
        )  # in this order already
    group = spec.num_kv_heads // lanes if lanes else 1  # KV heads of a lane

    allocation = Allocation(requested=requested, density=density.T)
    if _evicts(policy):
        room = layer_room(policy, budget, length)
        context = pack(keys, values, positions, order, slots, regular_slots(layers, room), room=room)
        return hidden, [context], allocation, slot_weights(policy, scores, order, requested, context, room)

    def store(order: jax.Array, slots: jax.Array, pool: int, bits: int | None) -> PackedStore:
        if bits is None:
            return pack(keys, values, positions, order, slots, pool, lanes)
        constant = jax.lax.stop_gradient((keys, values))  # integers have no derivative
        return pack(*constant, positions, order, slots, pool, lanes, bits, jax.lax.stop_gradient(channels))

    pool = capacity(group * allocate.capacity(length, budget), group * layers, segment_alignment(policy.bits))
    stores = [store(order, slots, pool, policy.bits)]
    if isinstance(policy.evicted, Quantise):
        assert others is not None
        bits = policy.evicted.bits
        # A prompt may keep next to nothing, so that there is room for all of it.
        pool = regular_slots(group * layers, int(align(length, segment_alignment(bits))))
        stores.append(store(others, jnp.expand_dims(lengths, (0, *range(2, slots.ndim))) - slots, pool, bits))
    return hidden, stores, allocation, no_queries(queries) if noted else None
