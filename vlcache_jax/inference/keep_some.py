"""Prefill under a budget: scores and candidates layer by layer, then budgets, selection and packing of all layers."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.geometry import capacity, segment_alignment, whole_tiles
from vlcache_jax.cache.packing import Selected
from vlcache_jax.cache.selection import candidates, protected_first, select_layers
from vlcache_jax.cache.state import Allocation
from vlcache_jax.cache.store import PackedStore, split
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.patterns.attending import layer_attention, shares_rows
from vlcache_jax.patterns.pattern import Pattern
from vlcache_jax.policies.decoding.rule import Prompt
from vlcache_jax.policies.policy import Policy
from vlcache_jax.policies.scores.attention import LayerInputs
from vlcache_jax.policies.shares import slot_budget
from vlcache_jax.policies.window import forced, settled
from vlcache_jax.pruning.plan import Plan
from vlcache_jax.pruning.stage import Stage, joined
from vlcache_jax.typing import ModelSpec, WithOutput


def keep_some(
    run: Any,
    rotate: Any,
    spec: ModelSpec,
    prompt: Stage,
    plan: Plan,
    policy: Policy,
    pattern: Pattern | None,
    kernels: Kernels,
) -> tuple[jax.Array, list[Stage], list[PackedStore], Allocation, Any, Any]:
    """Attention, scores and candidates layer by layer; then budgets, selection and packing for all layers at once.

    Layers with a window take no part in the budget: nothing scores them, and what they keep is their window.
    """
    lengths, batch = prompt.lengths, len(prompt.lengths)
    layers, length, windows = spec.num_layers, prompt.room, spec.layer_windows
    allocate = policy.sharing
    lanes = policy.lanes if allocate.per_head else None
    budget = slot_budget(policy.budget, spec, lanes, policy.bits, policy.evicted.bits)
    windowed = jnp.asarray([window is not None for window in windows])
    held = [min(window or 0, length) for window in windows]  # tokens of the layers with a window
    count = max(policy.candidates(length, budget), *held)  # tokens that a layer hands on: room for those of every row
    wide = spec.full_layers[: policy.whole_layers] if count < length else ()  # layers that hand on all they have
    entries = length if wide else count
    starts = np.cumsum((0, *(length if layer in wide else count for layer in range(layers)))).tolist()
    threshold = allocate.threshold
    measure = threshold is not None or policy.score.needs_attention
    rule = policy.rule
    mean = jnp.asarray(budget.total(lengths)) // budget.layers
    recent = settled(policy.recent, mean)
    window = None if isinstance(recent, int | float) else jnp.maximum(1, recent)

    def forced_tokens(slots, windowed):
        latest, sinks = forced(slots, recent, policy.sinks)
        if not spec.windows:
            return latest, sinks
        return jnp.where(windowed, slots, latest), jnp.where(windowed, 0, sinks)

    def attend_in(said: Stage) -> Any:
        stage = said.once()
        lengths, room = stage.lengths, stage.room
        first, rows = policy.rows.span(said.lengths, said.vision_mask)
        last = said.mask.last()
        number = rows.astype(jnp.float32)
        # (q, j), j <= q, q in first .. first + rows - 1
        pairs = number * (first.astype(jnp.float32) + (number + 1) / 2)
        if last is not None:  # and those after q in its block, where scoring rows lie in one
            index = jax.lax.iota(jnp.int32, said.room)[None]
            chosen = (index >= first[:, None]) & (index < (first + rows)[:, None])
            pairs += jnp.sum(jnp.where(chosen, last - index, 0), axis=1).astype(jnp.float32)

        def judge(layer, query, key, value, lse, shared, output):
            """(scores, ties, (density, whether heads are finite), what allocation and rule want) of a layer."""
            statistics, density = None, jnp.ones((batch,), jnp.float32)
            if measure:
                bounds: dict[str, Any] = {"threshold": threshold, "max_rows": policy.rows.most}
                bounds["column_maximum"] = policy.score.needs_maximum
                statistics = shared  # of the rows that a sparse prefill looks at, too
                if statistics is None:
                    statistics = ops.column_statistics(kernels, query, key, first, rows, lse, last, **bounds)
                if statistics.counts is not None:
                    density = jnp.mean(statistics.counts, axis=1) / pairs
            if said.room > room:
                query, key, value = query[:, :room], key[:, :room], value[:, :room]
                statistics = None if statistics is None else statistics.of_columns(room)
            inputs = LayerInputs(
                query=query,
                key=key,
                value=value,
                lengths=lengths,
                vision_index=stage.vision_index,
                layer=layer,
                density=density,
                rows=rows,
                statistics=statistics,
                window=window,
                slots=mean,
                rotate=rotate,
                positions=stage.positions,
                output=output,
                mask=stage.mask,
                index=stage.index,
            )
            scores, ties = policy.score(inputs), policy.score.ties(inputs)
            # Of each head: those are apart on a mesh.
            finite = jnp.all(jnp.isfinite(scores) | ~inputs.valid[:, None], axis=2)
            if policy.evicted.mixes:  # a token that is not a number would spoil all those it is merged with
                sound = jnp.isfinite(key).all(axis=3) & jnp.isfinite(value).all(axis=3)
                finite &= jnp.all(sound | ~inputs.valid[..., None], axis=1)
            whole = inputs, scores  # what is measured has one shape in all layers
            if room < length:
                whole = inputs.padded(length), _padded(scores, length, -jnp.inf)
            measured = allocate.measure(*whole)
            if policy.protect is not None:
                scores = protected_first(scores, lengths, inputs.vision_mask == (policy.protect == "vision"), ties)
                ties = None  # the ranks have none
            return scores, ties, (density, finite), measured, rule.note(inputs)

        def judged(evicts, *inputs):
            if evicts:
                return judge(*inputs)
            return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), jax.eval_shape(judge, *inputs))

        def attend(query, key, value, carry, layer, output=None):
            shares = measure and not policy.score.needs_maximum and shares_rows(pattern, spec, room, policy.rows)
            asked: dict[str, Any] = {"with_lse": measure and threshold is None}
            asked["statistics"] = (threshold,) if shares else ()
            whole = query, key, value
            out, lse, told, shared = layer_attention(kernels, pattern, spec, said, layer, *whole, **asked)
            seen = jax.lax.stop_gradient((query, key, value, lse, shared, output))  # what is kept has no derivative
            evicts = [window is None for window in windows]
            scores, ties, judgement, measured, noted = ops.of_layer(evicts, layer, judged, layer, *seen)
            if said.room > room:
                key, value = key[:, :room], value[:, :room]
            positions = jnp.broadcast_to(jax.lax.iota(jnp.int32, room), (batch, 1, room))
            if count < length:
                positions = jnp.broadcast_to(positions, scores.shape)
            handed = _Handed(key.swapaxes(1, 2), value.swapaxes(1, 2), scores, ties, positions)
            few, everything = min(count, room), handed
            if few < room:
                latest, earliest = forced_tokens(jnp.full_like(lengths, few), windowed[layer])
                handed = handed.at(candidates(scores, lengths, few, latest, earliest, ties))
            handed = handed.padded(entries, length)
            if wide:  # one after another, in place: the next layer begins where this one's end, not where padding does
                is_wide = jnp.asarray([i in wide for i in range(layers)])[layer]
                handed = jax.tree.map(partial(jnp.where, is_wide), everything.padded(entries, length), handed)
                start = jnp.asarray(starts, jnp.int32)[layer]
                carry = tuple(
                    split(jax.lax.dynamic_update_slice_in_dim(pool, x.astype(pool.dtype), start, axis=2))
                    for pool, x in zip(carry, (handed.keys, handed.values))
                )
                handed = handed._replace(keys=None, values=None)
            return out, carry, (handed, judgement, measured, noted, told)

        return WithOutput(attend) if policy.score.needs_output else attend

    pools = None
    if wide:
        pool_shape = batch, spec.num_kv_heads, starts[-2] + length, spec.head_dim
        pools = varying((split(jnp.zeros(pool_shape, spec.dtype)),) * 2, lengths)
    logits, pools, stages = run(attend_in, pools)
    stages = [(stage.once(), ys) for stage, ys in stages]
    handed, (density, finite), measured, noted, told = joined([ys for _, ys in stages])
    scores, ties, positions = handed[2:]
    keys, values = pools if wide else handed[:2]
    there = joined([jnp.broadcast_to(stage.lengths, (stage.size, batch)) for stage, _ in stages])  # tokens of a layer
    density = jnp.where(jnp.all(finite, axis=2), density, jnp.nan)
    if spec.windows:
        measured = jax.tree.map(lambda x: x[jnp.asarray(spec.full_layers)], measured)
    measured = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), measured)

    def share(measured, lengths):
        return allocate.slots(measured, lengths, budget)  # [batch, layers], or [batch, layers, kv_heads]

    requested = (share if lanes else by_row(share, batch))(measured, lengths)
    if spec.windows:
        own = jnp.minimum(lengths[:, None], jnp.asarray(held, jnp.int32)[None])
        own = jnp.broadcast_to(
            own.reshape(*own.shape, *(1,) * (requested.ndim - 2)), (*own.shape, *requested.shape[2:])
        )
        requested = own.at[:, jnp.asarray(spec.full_layers)].set(requested)
    bounded = jnp.asarray([windows[layer] is None and layer not in wide for layer in range(layers)])
    own_most = jnp.where(bounded[:, None], policy.candidates(lengths, budget), length)
    most = jnp.expand_dims(jnp.minimum(own_most, there), range(2, requested.ndim))
    slots = jnp.minimum(jnp.swapaxes(requested, 0, 1), most)

    latest, earliest = jax.vmap(forced_tokens)(slots, windowed)
    ranked = {
        "scores": scores,
        "positions": positions,
        "slots": slots,
        "latest": latest,
        "first": earliest,
        "ties": ties,
    }
    chosen = []
    for stage, _ in stages:
        mine = jax.tree.map(lambda x: x[slice(*stage.layers)], ranked)  # noqa: B023
        chosen.append(select_layers(lengths=stage.lengths, rest=policy.evicted.keeps_others, **mine))
    order, others = joined(chosen)
    keys, values = keys.astype(spec.dtype), values.astype(spec.dtype)
    selected = Selected(
        keys=keys,
        values=values,
        positions=positions,
        order=order,
        slots=slots,
        lengths=there,
        lanes=lanes,
        others=others,
        windowed=windowed if spec.windows else None,
        places=_places(stages, length),
        starts=tuple(starts[:-1]) if wide else None,
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
    if selected.places is not None:  # what a layer does not have it cannot miss
        requested = jnp.minimum(requested, jnp.expand_dims(there.T, range(2, requested.ndim)))
    allocation = Allocation(requested=requested, density=density.T)
    stores = [context, *policy.evicted.stores(selected, budget.layers, allocate.least(length, budget))]
    return logits, [stage for stage, _ in stages], stores, allocation, observed, told


class _Handed(NamedTuple):
    """What a layer hands on: keys and values [batch, kv_heads, entries, head_dim]; scores, ties and positions in the
    prompt, [batch, heads or 1, entries]."""

    keys: Any
    values: Any
    scores: jax.Array
    ties: jax.Array | None
    positions: jax.Array

    def at(self, positions: jax.Array) -> "_Handed":
        keys, values = (jnp.take_along_axis(x, positions[..., None], axis=2) for x in (self.keys, self.values))
        ties = None if self.ties is None else jnp.take_along_axis(self.ties, positions, axis=2)
        return _Handed(keys, values, jnp.take_along_axis(self.scores, positions, axis=2), ties, positions)

    def padded(self, entries: int, length: int) -> "_Handed":
        """With entries that are never selected."""
        more = entries - self.scores.shape[2]
        if not more:
            return self
        keys, values = (jnp.pad(x, [(0, 0), (0, 0), (0, more), (0, 0)]) for x in (self.keys, self.values))
        ties = None if self.ties is None else _padded(self.ties, entries, 0)
        return _Handed(
            keys, values, _padded(self.scores, entries, -jnp.inf), ties, _padded(self.positions, entries, length)
        )


def _padded(x: jax.Array, length: int, value: Any) -> jax.Array:
    """[..., n] with padding up to `length`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])], constant_values=value)


def _places(stages: Sequence[tuple[Stage, Any]], length: int) -> jax.Array | None:
    """i32 [layers, batch, length], the place in the prompt of each token of a layer; None where nothing was dropped."""
    if len(stages) == 1 and stages[0][0].index is None:
        return None
    places = [(_padded(stage.places, length, -1), stage.size) for stage, _ in stages]
    return jnp.concatenate([jnp.broadcast_to(x, (size, *x.shape)) for x, size in places])
