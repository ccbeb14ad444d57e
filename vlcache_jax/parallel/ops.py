"""The one place through which a model's `forward`, prefill and decoding reach the kernels: which implementation runs,
and on which devices.

Under a mesh (`jax.set_mesh`; the public functions enter the one that the parameters lie on) every device runs the ops
on its own rows and KV heads inside `jax.shard_map` (`parallel.mesh`). Nothing of an op needs another device, so there
is no collective in any of them, but for the sum behind a product with a weight whose input channels are split.
"""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlcache_jax.errors import InputError
from vlcache_jax.kernels import append as append_op
from vlcache_jax.kernels import attention as attention_op
from vlcache_jax.kernels import column_statistics as column_statistics_op
from vlcache_jax.kernels import decode_attention as decode_attention_op
from vlcache_jax.kernels import quantised_matmul as quantised_matmul_op
from vlcache_jax.kernels import sparse_attention as sparse_attention_op
from vlcache_jax.kernels.attention import CAUSAL, Mask
from vlcache_jax.kernels.column_statistics import ColumnStatistics
from vlcache_jax.kernels.decode_attention import Segments, Store
from vlcache_jax.kernels.merge import merge
from vlcache_jax.kernels.sparse_attention import Lists
from vlcache_jax.kernels.varying import is_checked
from vlcache_jax.parallel.mesh import MODEL_AXIS, free_axes, local, split_axes
from vlcache_jax.parallel.params import coded_specs

_OPS = {
    "attention": attention_op,
    "column_statistics": column_statistics_op,
    "decode_attention": decode_attention_op,
    "append": append_op,
    "sparse_attention": sparse_attention_op,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which implementation of each op to use: None for the best of the platform the program is compiled for.

    Attributes:
      attention: of the prefill: "splash_tpu", "cudnn", "xla", "xla_wide", "reference", or a tuple of names, the first
        that serves.
      column_statistics: "pallas_tpu", "xla", "xla_columns" or "reference".
      decode_attention: "pallas_tpu", "pallas_gpu", "xla", "xla_wide" or "reference".
      append: of a token's keys and values to those of the answer: "pallas_tpu", "xla" or "reference".
      sparse_attention: of a prefill by a pattern: "pallas_tpu", "xla", "xla_wide" or "reference".

    Raises:
      InputError: a name that does not exist.

    Example:
      out = vlc.generate(model, params, batch, policy, kernels=vlc.Kernels(attention=("cudnn", "xla_wide")))
    """

    attention: str | tuple[str, ...] | None = None
    column_statistics: str | None = None
    decode_attention: str | None = None
    append: str | None = None
    sparse_attention: str | None = None

    def __post_init__(self) -> None:
        for op, module in _OPS.items():
            value, choices = getattr(self, op), module.IMPLEMENTATIONS
            names = value if isinstance(value, tuple) else () if value is None else (value,)
            for name in names:
                if name not in choices:
                    near = difflib.get_close_matches(str(name), choices, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise InputError(f"Kernels({op}={name!r}): use one of {', '.join(choices)}, or None{hint}")


def of_layer(kinds: Sequence[Any], layer: jax.Array | int, run: Callable[..., Any], *args: Any) -> Any:
    """`run(kinds[layer], *args)` in a scan over layers: a branch for each kind that there is, none if all are alike.

    So layers that differ in what is static, the window of a mask say, are in one scan, their weights stacked, and only
    what differs is compiled more than once. Of the branches a device runs the one of its layer.

    Args:
      kinds: hashable, of every layer.
      layer: i32 [], traced.
      run: what it gives has the same shapes for every kind.
      *args: arrays.
    """
    different = tuple(dict.fromkeys(kinds))
    if len(different) == 1:
        return run(different[0], *args)
    index = jnp.asarray([different.index(kind) for kind in kinds], jnp.int32)
    return jax.lax.switch(index[layer], [partial(run, kind) for kind in different], *args)


def attention(
    kernels: Kernels,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array | None = None,
    *,
    mask: Mask = CAUSAL,
    with_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """`kernels.attention.attention` of right-padded prompts, or of images."""

    def run(query, key, value, lengths, mask):
        return attention_op.attention(
            query, key, value, mask, lengths=lengths, with_lse=with_lse, implementation=kernels.attention
        )

    rows, heads = split_axes(key.shape[0], key.shape[2])
    split = PartitionSpec(rows, None, heads)
    row = jax.tree.map(lambda _: PartitionSpec(rows), (lengths, mask))
    lse = split if with_lse else None
    return local(run, (split, split, split, *row), (split, lse))(query, key, value, lengths, mask)


def layer_attention(
    kernels: Kernels,
    windows: Sequence[int | None],
    layer: jax.Array | int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array | None = None,
    *,
    mask: Mask = CAUSAL,
    with_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """`attention` in a scan over layers that have `windows` (`ModelSpec.layer_windows`)."""

    def run(window: int | None, *arrays: Any) -> tuple[jax.Array, jax.Array | None]:
        return attention(kernels, *arrays, mask=dataclasses.replace(mask, window=window), with_lse=with_lse)

    return of_layer(windows, layer, run, query, key, value, lengths)


def sparse_attention(
    kernels: Kernels,
    choose: Callable[..., tuple[Lists, tuple[jax.Array, jax.Array, Lists] | None, Any]],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    per_row: Any,
) -> tuple[jax.Array, Any]:
    """`kernels.sparse_attention.sparse_attention` with the lists that a function chooses, on each device its own.

    Args:
      kernels: which implementation.
      choose: (query, key, heads, per_row) -> (lists, others, what it tells of them, a pytree of arrays [batch, list
        heads, ...]); heads i32 [heads] are the numbers in the model of a device's query heads. Others, or None, are of
        tokens in another order: (order, back, lists), see `patterns.pattern.Moved`.
      query: [batch, length, heads, head_dim].
      key: [batch, length, kv_heads, head_dim].
      value: like `key`.
      per_row: a pytree of arrays [batch, ...].

    Returns:
      (out, what was told).
    """

    def run(query, key, value, heads, per_row):
        lists, moved, told = choose(query, key, heads, per_row)
        attend = partial(sparse_attention_op.sparse_attention, implementation=kernels.sparse_attention)
        out, lse = attend(query, key, value, lists)
        if moved is not None:
            order, back, others = moved
            rest, rest_lse = attend(_moved(query, order), _moved(key, order), _moved(value, order), others)
            parts = (out, lse), (_moved(rest, back), _moved(rest_lse, back))
            out = merge([(x.astype(jnp.float32), y) for x, y in parts])[0].astype(value.dtype)
        return out, told

    rows, split_heads = split_axes(key.shape[0], key.shape[2])
    split, of_list = PartitionSpec(rows, None, split_heads), PartitionSpec(rows, split_heads)
    of_rows = jax.tree.map(lambda _: PartitionSpec(rows), per_row)
    inputs = (split, split, split, PartitionSpec(split_heads), of_rows)
    heads = jax.lax.iota(jnp.int32, query.shape[2])
    return local(run, inputs, (split, of_list))(query, key, value, heads, per_row)


def _moved(x: jax.Array, order: jax.Array) -> jax.Array:
    """x [batch, length, heads, ...] with the tokens of each head in an order i32 [batch, list heads, length]."""
    heads = max(x.shape[2], order.shape[1])
    x, order = jnp.repeat(x, heads // x.shape[2], axis=2), jnp.repeat(order, heads // order.shape[1], axis=1)
    order = order.swapaxes(1, 2).reshape(*x.shape[:2], heads, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, order, axis=1)


def column_statistics(
    kernels: Kernels,
    query: jax.Array,
    key: jax.Array,
    first: jax.Array,
    count: jax.Array,
    lse: jax.Array | None,
    last: jax.Array | None = None,
    **options: Any,
) -> ColumnStatistics:
    """`kernels.column_statistics.column_statistics`."""

    def run(query, key, first, count, lse, last):
        return column_statistics_op.column_statistics(
            query, key, first, count, last=last, lse=lse, implementation=kernels.column_statistics, **options
        )

    rows, heads = split_axes(key.shape[0], key.shape[2])
    split, row = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    inputs = (split, split, row, row, None if lse is None else split, None if last is None else row)
    column = PartitionSpec(rows, heads)
    outputs: Any = ColumnStatistics(column, column, lse=split, maximum=split, column_maximum=column)  # type: ignore[arg-type]
    return local(run, inputs, outputs)(query, key, first, count, lse, last)


def union_attention(
    kernels: Kernels, query: jax.Array, parts: Sequence[tuple[Store, Segments]]
) -> tuple[jax.Array, jax.Array]:
    """`kernels.decode_attention.union_attention`.

    A store with fewer rows than the query is split like the query where its rows divide, too; a single row is on every
    device. Any other store is read whole by all devices, for all queries.
    """

    def run(query, parts):
        return decode_attention_op.union_attention(query, parts, implementation=kernels.decode_attention)

    kv_heads = max(max(store.lanes, segments.lengths.shape[1]) for store, segments in parts)
    rows, heads = split_axes(query.shape[0], kv_heads)
    if any(split_axes(query.shape[0], store.lanes)[1] is None and store.lanes > 1 for store, _ in parts):
        heads = None  # a device's heads would not be where they look for their lane

    def of_store(store: Store) -> tuple[str, ...] | None:
        return split_axes(store.keys.shape[0], kv_heads)[0]

    def attend(parts: list[tuple[Store, Segments]], rows: tuple[str, ...] | None) -> tuple[jax.Array, jax.Array]:
        def place(part: tuple[Store, Segments]) -> tuple[Any, Any]:
            store, segments = part
            own = of_store(store) if rows else None
            # The one lane of a store that all heads share is on every device, and each reads its own heads' segments.
            lanes = None if store.lanes < kv_heads and store.lanes == 1 else heads
            placed: Any = jax.tree.map(lambda _: PartitionSpec(own, lanes), store)
            table = PartitionSpec(own, None if segments.lengths.shape[1] == 1 else heads)
            return placed, Segments(table, table, None if segments.skip is None else PartitionSpec(rows))  # type: ignore[arg-type]

        block = () if query.ndim == 3 else (None,)
        split = PartitionSpec(rows, *block, heads)
        return local(run, (split, [place(part) for part in parts]), (split, split))(query, parts)

    here = [part for part in parts if rows is None or of_store(part[0]) or part[0].keys.shape[0] == 1]
    everywhere = [part for part in parts if not any(part is other for other in here)]
    results = [attend(some, axes) for some, axes in ((here, rows), (everywhere, None)) if some]
    return merge(results) if len(results) > 1 else results[0]


def append(
    kernels: Kernels, buffers: Sequence[jax.Array], new: Sequence[jax.Array], slots: jax.Array
) -> tuple[jax.Array, ...]:
    """`kernels.append.append`; every buffer is split over its own heads."""

    def run(buffers, new, slots):
        return append_op.append(buffers, new, slots, implementation=kernels.append)

    places = tuple(PartitionSpec(*split_axes(*buffer.shape[:2])) for buffer in buffers)
    rows = PartitionSpec(split_axes(slots.shape[0])[0])
    return local(run, (places, places, rows), places)(tuple(buffers), tuple(new), slots)


def quantised_matmul(
    name: str,
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    layer: jax.Array | int = 0,
) -> jax.Array:
    """`kernels.quantised_matmul.quantised_matmul` with the projection called `name`, split as its parameters lie."""

    def run(x: jax.Array, weights: Any, layer: jax.Array) -> jax.Array:
        codes, scales, zeros = weights
        out = quantised_matmul_op.quantised_matmul(x, codes, scales, zeros, layer)
        return jax.lax.psum(out, MODEL_AXIS) if summed and mapped else out

    axes = free_axes()
    mapped = bool(axes) and not is_checked()
    codes_spec, scales_spec = coded_specs(name, codes.shape, scales.shape, axes.get(MODEL_AXIS, 1))
    summed = codes_spec[-2] is not None
    row = PartitionSpec(split_axes(x.shape[0])[0], *[None] * (x.ndim - 2))
    weights = (codes_spec, scales_spec, None if zeros is None else scales_spec)
    inputs = (PartitionSpec(*row, codes_spec[-2]), weights, PartitionSpec())
    run = local(run, inputs, PartitionSpec(*row, codes_spec[-1]))
    return run(x, (codes, scales, zeros), jnp.asarray(layer, jnp.int32))
