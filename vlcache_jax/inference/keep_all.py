"""Prefill under a budget of 1: every layer writes all tokens that it ever looks back at."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.geometry import align, segment_alignment, whole_tiles, window_rooms
from vlcache_jax.cache.packing import empty_codes, quantise_into
from vlcache_jax.cache.state import Allocation
from vlcache_jax.cache.store import PackedStore, split
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.patterns.attending import layer_attention
from vlcache_jax.patterns.pattern import Pattern
from vlcache_jax.policies.decoding.rule import Prompt
from vlcache_jax.policies.policy import Policy
from vlcache_jax.policies.scores.attention import LayerInputs
from vlcache_jax.pruning.plan import Plan
from vlcache_jax.pruning.stage import Stage, joined
from vlcache_jax.typing import ModelSpec


def keep_all(
    run: Any,
    rotate: Any,
    spec: ModelSpec,
    prompt: Stage,
    plan: Plan,
    policy: Policy,
    pattern: Pattern | None,
    kernels: Kernels,
) -> tuple[jax.Array, list[Stage], list[PackedStore], Allocation, Any, Any]:
    """All tokens that layers ever look back at: each layer writes its segment of the pool in place.

    A layer with a window writes its latest tokens first, and behind them whatever fills up `room` slots: the next layer
    overwrites it.
    """
    layers, bits, windows = spec.num_layers, policy.bits, spec.layer_windows
    length, batch, alone = prompt.room, len(prompt.lengths), len(plan.rooms) == 1
    # The slots that a stage's layers write, and where each of them starts.
    widths = [int(align(room, segment_alignment(bits))) for room in plan.rooms]
    rooms = window_rooms(windows, length, segment_alignment(bits))
    if not alone:
        rooms = tuple(np.repeat(widths, plan.sizes(layers)).tolist())
    starts, tokens = np.cumsum((0, *rooms[:-1])), [min(w or length, length) for w in windows]

    def attend_in(stage: Stage) -> Any:
        lengths, room = stage.lengths, int(align(stage.room, segment_alignment(bits)))

        def attend(query, key, value, pools, layer):
            seen = query, key, value
            out, _, told, _ = layer_attention(kernels, pattern, spec, stage, layer, *seen, with_lse=False)
            noted = noted_of(stage, layer, *seen)
            held, start = lengths, layer * room
            if spec.windows or not alone:
                start = jnp.asarray(starts, jnp.int32)[layer]
            if spec.windows:
                held = jnp.minimum(lengths, jnp.asarray(tokens, jnp.int32)[layer])
                index = jnp.minimum((lengths - held)[:, None] + jax.lax.iota(jnp.int32, length)[None], length - 1)
                key, value = (jnp.take_along_axis(x, index[..., None, None], axis=1) for x in (key, value))
            if bits is not None:
                key, value = jax.lax.stop_gradient((key, value))  # integers have no derivative
                return out, write(pools, key, value, held, start, room), (told, noted)
            pools = tuple(
                split(jax.lax.dynamic_update_slice_in_dim(pool, x.swapaxes(1, 2).astype(pool.dtype), start, axis=2))
                for pool, x in zip(pools, (key, value))
            )
            return out, pools, (told, noted)

        return attend

    def noted_of(stage: Stage, layer, query, key, value):
        """What the rule for generated tokens wants to know of a layer."""
        inputs = LayerInputs(
            query=query,
            key=key,
            value=value,
            lengths=stage.lengths,
            vision_index=stage.vision_index,
            layer=layer,
            density=jnp.ones((batch,), jnp.float32),
            rows=stage.lengths,
            mask=stage.mask,
            index=stage.index,
        )
        return jax.lax.stop_gradient(policy.rule.note(inputs))

    def write(pools, key, value, held, start, room):
        assert bits is not None
        pad = [(0, 0), (0, 0), (0, room - key.shape[1]), (0, 0)]
        key, value = (jnp.pad(x.swapaxes(1, 2), pad) for x in (key, value))
        valid = (jax.lax.iota(jnp.int32, room)[None] < held[:, None])[:, None]

        def read(start, size):
            return tuple(jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (key, value, valid))

        return jax.tree.map(split, quantise_into(pools, read, start, room, bits))

    slots = whole_tiles(int(starts[-1]) + widths[-1])
    shape = (batch, spec.num_kv_heads, slots, spec.head_dim)
    pools = empty_codes(shape, bits) if bits is not None else (jnp.zeros(shape, spec.dtype),) * 2
    pools = varying(jax.tree.map(split, pools), prompt.lengths)
    logits, (keys, values, *scales), stages = run(attend_in, pools)
    of_codes = dict(zip(("key_scales", "value_scales"), scales), bits=bits)
    told, noted = joined([ys for _, ys in stages])
    if spec.windows:
        context = PackedStore.latest(keys, values, prompt.lengths, tokens, rooms, slots, **of_codes)
    elif alone:
        context = PackedStore.regular(keys, values, prompt.lengths, layers, widths[0], **of_codes)
    else:
        parts = [(stage.places, stage.lengths, stage.size) for stage, _ in stages]
        context = PackedStore.by_layer(keys, values, parts, rooms, **of_codes)
    kept = jnp.broadcast_to(context.lengths[..., 0], (batch, layers))
    allocation = Allocation(requested=kept, density=jnp.ones(kept.shape, jnp.float32))
    observed = policy.rule.remember(policy, Prompt(None, None, kept, context, rooms, windows, noted))
    return logits, [stage for stage, _ in stages], [context], allocation, observed, told
