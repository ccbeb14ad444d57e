"""Prefill: one program from a batch of prompts to a context, the next token's logits and the compressed cache.

embed -> scan over layers (attention, statistics, candidates) -> allocate -> select -> pack
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.cache.geometry import align, capacity, segment_alignment, whole_tiles, window_rooms
from vlcache_jax.cache.packing import Selected, empty_codes, quantise_into, value_channels
from vlcache_jax.cache.selection import candidates, protected_first, select_layers
from vlcache_jax.cache.state import Allocation
from vlcache_jax.cache.store import PackedStore, split
from vlcache_jax.inference.context import Context
from vlcache_jax.inference.finiteness import finite_rows, require_finite
from vlcache_jax.inference.forward import embed_prompt, run_layers
from vlcache_jax.inference.report import make_report
from vlcache_jax.inference.validation import check_prefill
from vlcache_jax.inputs import Batch
from vlcache_jax.kernels.attention import Mask
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.mesh import automatic, by_row, on_mesh_of, refuse_partly_checked
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.placing import placed
from vlcache_jax.policies.decoding.rule import Prompt
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
    logits, stores, next_position, lengths, allocation, finite, observed = ran
    report = make_report(model.spec, policy, stores, allocation, lengths, batch.length, finite)
    return Context(
        model=model,
        params=params,
        stores=stores,
        next_position=next_position,
        next_index=lengths,
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
) -> tuple[jax.Array, tuple[PackedStore, ...], jax.Array, jax.Array, Allocation, jax.Array, Any]:
    """(logits, stores, next position, lengths, allocation, whether all was finite, what the rule remembers)."""
    embedded = embed_prompt(model, params, batch)
    lengths, next_position = (varying(jnp.asarray(x), params, batch) for x in (batch.lengths, embedded.next_position))
    run = partial(run_layers, model, params, embedded, lengths)
    fill = _keep_all if policy.keeps_all or not model.spec.full_layers else _compress
    rotate = partial(model.apply, {}, method="rotate")
    mask = Mask(blocks=embedded.blocks)
    logits, stores, allocation, observed = fill(run, rotate, model.spec, batch, lengths, mask, policy, kernels)
    finite = finite_rows(logits) & jnp.all(jnp.isfinite(allocation.density), axis=1)
    return logits, tuple(stores), next_position, lengths, allocation, finite, observed


def _keep_all(
    run: Any,
    rotate: Any,
    spec: ModelSpec,
    batch: Batch,
    lengths: jax.Array,
    mask: Mask,
    policy: Policy,
    kernels: Kernels,
) -> tuple[jax.Array, list[PackedStore], Allocation, None]:
    """All tokens that layers ever look back at: each layer writes its segment of the pool in place.

    A layer with a window writes its latest tokens first, and behind them whatever fills up `room` slots: the next layer
    overwrites it.
    """
    layers, bits, windows = spec.num_layers, policy.bits, spec.layer_windows
    room = int(align(batch.length, segment_alignment(bits)))
    rooms = window_rooms(windows, batch.length, segment_alignment(bits))
    starts, tokens = np.cumsum((0, *rooms[:-1])), [min(w or batch.length, batch.length) for w in windows]

    def attend(query, key, value, pools, layer):
        out, _ = ops.layer_attention(kernels, windows, layer, query, key, value, lengths, mask=mask, with_lse=False)
        held, start = lengths, layer * room
        if spec.windows:
            held = jnp.minimum(lengths, jnp.asarray(tokens, jnp.int32)[layer])
            start = jnp.asarray(starts, jnp.int32)[layer]
            index = jnp.minimum(
                (lengths - held)[:, None] + jax.lax.iota(jnp.int32, batch.length)[None], batch.length - 1
            )
            key, value = (jnp.take_along_axis(x, index[..., None, None], axis=1) for x in (key, value))
        if bits is not None:
            key, value = jax.lax.stop_gradient((key, value))  # integers have no derivative
            channels = value_channels(value, held)
            return out, write(pools, key, value.astype(jnp.float32) / channels[:, None], held, start), channels
        pools = tuple(
            split(jax.lax.dynamic_update_slice_in_dim(pool, x.swapaxes(1, 2).astype(pool.dtype), start, axis=2))
            for pool, x in zip(pools, (key, value))
        )
        return out, pools, None

    def write(pools, key, value, held, start):
        assert bits is not None
        pad = [(0, 0), (0, 0), (0, room - batch.length), (0, 0)]
        key, value = (jnp.pad(x.swapaxes(1, 2), pad) for x in (key, value))
        valid = (jax.lax.iota(jnp.int32, room)[None] < held[:, None])[:, None]

        def read(start, size):
            return tuple(jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (key, value, valid))

        return tuple(split(x) for x in quantise_into(pools, read, start, room, bits))

    slots = whole_tiles(int(starts[-1]) + room)
    shape = (batch.size, spec.num_kv_heads, slots, spec.head_dim)
    pools = empty_codes(shape, bits) if bits is not None else [jnp.zeros(shape, spec.dtype)] * 2
    pools = varying(tuple(split(x) for x in pools), lengths)
    logits, (keys, values, *scales), channels = run(attend, pools, jax.lax.iota(jnp.int32, layers))
    of_codes = dict(zip(("key_scales", "value_scales"), scales))
    if channels is not None:
        of_codes["value_channels"] = channels.swapaxes(0, 1)
    if spec.windows:
        context = PackedStore.latest(keys, values, lengths, tokens, rooms, slots, **of_codes)
    else:
        context = PackedStore.regular(keys, values, lengths, layers, room, **of_codes)
    kept = jnp.broadcast_to(context.lengths[..., 0], (batch.size, layers))
    return logits, [context], Allocation(requested=kept, density=jnp.ones(kept.shape, jnp.float32)), None


def _compress(
    run: Any,
    rotate: Any,
    spec: ModelSpec,
    batch: Batch,
    lengths: jax.Array,
    mask: Mask,
    policy: Policy,
    kernels: Kernels,
) -> tuple[jax.Array, list[PackedStore], Allocation, Any]:
    """Attention, scores and candidates layer by layer; then budgets, selection and packing for all layers at once.

    Layers with a window take no part in the budget: nothing scores them, and what they keep is their window.
    """
    layers, length, windows = spec.num_layers, batch.length, spec.layer_windows
    allocate = policy.sharing
    lanes = policy.lanes if allocate.per_head else None
    budget = slot_budget(policy.budget, spec, lanes, policy.bits)
    windowed = jnp.asarray([window is not None for window in windows])
    held = [min(window or 0, length) for window in windows]  # tokens of the layers with a window
    count = max(1, floor_fraction(length, policy.candidate_fraction), *held)
    threshold = allocate.threshold
    quantised = policy.bits is not None or policy.evicted.bits is not None
    measure = threshold is not None or policy.score.needs_attention
    first, rows = policy.rows.span(lengths, batch.vision_mask)
    last = mask.last()
    rule = policy.rule
    mean = jnp.asarray(budget.total(lengths)) // budget.layers
    recent = settled(policy.recent, mean)
    window = None if isinstance(recent, int | float) else jnp.maximum(1, recent)
    number = rows.astype(jnp.float32)
    pairs = number * (first.astype(jnp.float32) + (number + 1) / 2)  # (q, j), j <= q, q in first .. first + rows - 1
    if last is not None:  # and those after q in its block, where scoring rows lie in one
        index = jax.lax.iota(jnp.int32, length)[None]
        chosen = (index >= first[:, None]) & (index < (first + rows)[:, None])
        pairs += jnp.sum(jnp.where(chosen, last - index, 0), axis=1).astype(jnp.float32)

    def judge(layer, query, key, value, lse):
        """(scores, ties, (density, whether heads are finite), what allocation and decoding rule want) of a layer."""
        statistics, density = None, jnp.ones((batch.size,), jnp.float32)
        if measure:
            bounds: dict[str, Any] = {"threshold": threshold, "max_rows": policy.rows.most}
            statistics = ops.column_statistics(kernels, query, key, first, rows, lse, last, **bounds)
            if statistics.counts is not None:
                density = jnp.mean(statistics.counts, axis=1) / pairs
        inputs = LayerInputs(
            query=query,
            key=key,
            value=value,
            lengths=lengths,
            vision_index=jnp.asarray(batch.vision_index),
            layer=layer,
            density=density,
            rows=rows,
            statistics=statistics,
            window=window,
            rotate=rotate,
            mask=mask,
        )
        scores, ties = policy.score(inputs), policy.score.ties(inputs)
        finite = jnp.all(
            jnp.isfinite(scores) | ~inputs.valid[:, None], axis=2
        )  # of each head: those are apart on a mesh
        if policy.evicted.mixes:  # a token that is not a number would spoil all those it is merged with
            sound = jnp.isfinite(key).all(axis=3) & jnp.isfinite(value).all(axis=3)
            finite &= jnp.all(sound | ~inputs.valid[..., None], axis=1)
        measured = allocate.measure(inputs, scores)
        if policy.protect is not None:
            scores = protected_first(scores, lengths, inputs.vision_mask == (policy.protect == "vision"), ties)
            ties = None  # the ranks have none
        return scores, ties, (density, finite), measured, rule.note(inputs)

    def judged(evicts, *inputs):
        if evicts:
            return judge(*inputs)
        return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), jax.eval_shape(judge, *inputs))

    def forced_tokens(slots, windowed):
        latest, sinks = forced(slots, recent, policy.sinks)
        if not spec.windows:
            return latest, sinks
        return jnp.where(windowed, slots, latest), jnp.where(windowed, 0, sinks)

    def attend(query, key, value, carry, layer):
        options: dict[str, Any] = {"mask": mask, "with_lse": measure and threshold is None}
        out, lse = ops.layer_attention(kernels, windows, layer, query, key, value, lengths, **options)
        seen = jax.lax.stop_gradient((query, key, value, lse))  # what is kept has no derivative
        evicts = [window is None for window in windows]
        scores, ties, judgement, measured, noted = ops.of_layer(evicts, layer, judged, layer, *seen)
        positions = jnp.broadcast_to(jax.lax.iota(jnp.int32, length), (batch.size, 1, length))
        channels = value_channels(value, lengths) if quantised else None
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if count < length:
            wanted = jnp.full_like(lengths, count)
            latest, first = forced_tokens(wanted, windowed[layer])
            positions = candidates(scores, lengths, count, latest, first, ties)
            ties = None if ties is None else jnp.take_along_axis(ties, positions, axis=2)
            scores = jnp.take_along_axis(scores, positions, axis=2)
            key, value = (jnp.take_along_axis(x, positions[..., None], axis=2) for x in (key, value))
        return out, carry, (key, value, scores, ties, positions, channels, judgement, measured, noted)

    logits, _, layer_outputs = run(attend, None, jax.lax.iota(jnp.int32, layers))
    keys, values, scores, ties, positions, channels, (density, finite), measured, noted = layer_outputs
    density = jnp.where(jnp.all(finite, axis=2), density, jnp.nan)
    if spec.windows:
        measured = jax.tree.map(lambda x: x[jnp.asarray(spec.full_layers)], measured)
    measured = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), measured)

    def share(measured, lengths):
        return allocate.slots(measured, lengths, budget)  # [batch, layers], or [batch, layers, kv_heads]

    requested = (share if lanes else by_row(share, batch.size))(measured, lengths)
    if spec.windows:
        own = jnp.minimum(lengths[:, None], jnp.asarray(held, jnp.int32)[None])
        own = jnp.broadcast_to(
            own.reshape(*own.shape, *(1,) * (requested.ndim - 2)), (*own.shape, *requested.shape[2:])
        )
        requested = own.at[:, jnp.asarray(spec.full_layers)].set(requested)
    most = jnp.expand_dims(jnp.minimum(count, lengths), range(1, requested.ndim))
    slots = jnp.swapaxes(jnp.minimum(requested, most), 0, 1)

    latest, earliest = jax.vmap(forced_tokens)(slots, windowed)
    rest = policy.evicted.keeps_others
    order, others = select_layers(scores, positions, lengths, slots, latest, earliest, ties, rest=rest)
    keys, values = keys.astype(spec.dtype), values.astype(spec.dtype)
    selected = Selected(
        keys, values, positions, order, slots, lengths, lanes, channels, others, windowed if spec.windows else None
    )
    selected = policy.evicted.applied(selected)
    rooms, group = rule.layer_rooms(policy, budget, windows, length), selected.group
    if rooms is None:
        most_slots = allocate.capacity(length, budget) + sum(held)
        pool = capacity(group * most_slots, group * layers, segment_alignment(policy.bits))
    else:
        pool = whole_tiles(sum(rooms[:-1]) + max(rooms))  # behind every start, a slice of the largest
    context = selected.pack(pool, policy.bits, rooms)
    observed = rule.remember(policy, Prompt(scores, order, requested, context, rooms, windows, noted))
    allocation = Allocation(requested=requested, density=density.T)
    return logits, [context, *policy.evicted.stores(selected, budget.layers)], allocation, observed
