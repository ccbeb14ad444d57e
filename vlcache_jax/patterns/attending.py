"""The attention of the prefill: dense, or by a pattern where it pays."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError
from vlcache_jax.kernels.column_statistics import ColumnStatistics
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.patterns.listing import Told, lists_of, moved_lists_of
from vlcache_jax.patterns.pattern import Pattern, PatternInputs, with_last_rows
from vlcache_jax.patterns.visual_grid import visual_strides
from vlcache_jax.policies.rows.spans import LastRows, Rows
from vlcache_jax.pruning.stage import Stage
from vlcache_jax.typing import ModelSpec


def check_pattern(pattern: Pattern, spec: ModelSpec) -> None:
    """Raises PolicyError if the pattern does not fit the model."""
    beyond = [layer for layer in pattern.dense_layers if layer >= spec.num_layers]
    if beyond:
        raise PolicyError(f"{pattern.name}: dense_layers={beyond} of a model with {spec.num_layers} layers")
    if not spec.full_layers:
        raise PolicyError(f"{pattern.name}: all layers of this model have windows, which look at few keys anyway")
    pattern.check(spec)


def why_dense(pattern: Pattern, room: int) -> str | None:
    """Why all layers of prompts padded to `room` tokens are dense; None if they are not."""
    if room < pattern.min_tokens:
        return f"{room} tokens are fewer than {pattern.name}(min_tokens={pattern.min_tokens})"
    return None


def dense_layers(pattern: Pattern | None, spec: ModelSpec, room: int) -> tuple[bool, ...]:
    """Which layers of prompts padded to `room` tokens are dense: those with windows always are."""
    if pattern is None or why_dense(pattern, room):
        return (True,) * spec.num_layers
    return tuple(window is not None or layer in pattern.dense_layers for layer, window in enumerate(spec.layer_windows))


def shares_rows(pattern: Pattern | None, spec: ModelSpec, room: int, rows: Rows) -> bool:
    """Whether the pattern looks at the very rows that score a policy's keys, in all layers: it then does both."""
    if pattern is None or not pattern.last_rows or rows != LastRows(pattern.last_rows):
        return False
    return not any(dense_layers(pattern, spec, room))


def layer_attention(
    kernels: Kernels,
    pattern: Pattern | None,
    spec: ModelSpec,
    stage: Stage,
    layer: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    with_lse: bool,
    statistics: Sequence[float | None] = (),
) -> tuple[jax.Array, jax.Array | None, Told | None, ColumnStatistics | None]:
    """A layer's attention in a scan over layers, which may differ in what they look at.

    Args:
      kernels, spec: as everywhere.
      pattern: None for dense layers.
      stage: the tokens.
      layer: i32 [], its number.
      query: [batch, length, heads, head_dim].
      key: [batch, length, kv_heads, head_dim].
      value: like `key`.
      with_lse: whether the log-sum-exp is wanted.
      statistics: (threshold,) where `shares_rows` and what the rows say of the columns is wanted, too.

    Returns:
      (out [batch, length, heads, head_dim], lse f32 [batch, length, heads], what was listed, [batch] each, statistics
      or None). With a pattern there is no lse: that of what was listed is not that of the row. Without one nothing is
      told.
    """
    if pattern is None:
        masked: dict[str, Any] = {"mask": stage.mask, "with_lse": with_lse}
        windows = spec.layer_windows
        out, lse = ops.layer_attention(kernels, windows, layer, query, key, value, stage.lengths, **masked)
        return out, lse, None, None
    kinds = list(zip(dense_layers(pattern, spec, stage.room), spec.layer_windows))
    if stage.blocks is not None and not all(dense for dense, _ in kinds):
        raise PolicyError(
            f"{pattern.name}: tokens of an image see each other in this model, and patterns look back only: leave "
            "prefill out"
        )
    batch = len(stage.lengths)
    whole = Told(jnp.ones((batch,), jnp.float32), jnp.zeros((batch,), jnp.int32))

    def run(kind: tuple[bool, int | None], query, key, value):
        dense, window = kind
        if dense:
            mask = dataclasses.replace(stage.mask, window=window)
            return ops.attention(kernels, query, key, value, stage.lengths, mask=mask, with_lse=False)[0], whole, None
        per_row = stage.lengths, stage.vision_mask, visual_strides(stage)
        choose = partial(_choose, pattern, layer, statistics)
        out, (told, seen) = ops.sparse_attention(kernels, choose, query, key, value, per_row)
        if seen is not None:
            seen = seen._replace(lse=seen.lse.swapaxes(1, 2), maximum=seen.maximum.swapaxes(1, 2))
        return out, Told(jnp.mean(told.density, axis=1), jnp.sum(told.overflow, axis=1, dtype=jnp.int32)), seen

    out, told, seen = ops.of_layer(kinds, layer, run, query, key, value)
    return out, None, told, seen


def _choose(pattern: Pattern, layer: jax.Array, statistics: Sequence[float | None], query, key, heads, per_row) -> Any:
    lengths, vision, grid = per_row
    inputs = PatternInputs(
        query=query,
        key=key,
        lengths=lengths,
        vision=vision,
        layer=layer,
        heads=heads,
        grid=grid,
        block=pattern.block,
    )
    inputs = with_last_rows(pattern, inputs)
    chosen = pattern.choose(inputs)
    (lists, told), moved, seen = lists_of(pattern, inputs, chosen), None, None
    if chosen.moved is not None:
        others, more = moved_lists_of(pattern, inputs, chosen.moved)
        moved = chosen.moved.order, chosen.moved.back, others
        told = Told(told.density + more.density, told.overflow + more.overflow)
    if statistics:
        assert inputs.last is not None
        seen = inputs.last.statistics(*statistics)
    return lists, moved, (told, seen)
