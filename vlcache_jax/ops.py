"""The one place through which prefill and decoding reach the kernels: which implementation runs, and on which devices.

Under a mesh (`jax.set_mesh`; the public functions enter the one that the parameters lie on) every device runs the ops
on its own rows and KV heads inside `jax.shard_map`: rows are split over all axes but "model", heads over "model", each
where the size divides. Nothing of an op needs another device, so there is no collective in any of them.
"""

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vlcache_jax import packing
from vlcache_jax.errors import InputError
from vlcache_jax.kernels import attention as attention_op
from vlcache_jax.kernels import column_statistics as column_statistics_op
from vlcache_jax.kernels import decode_attention as decode_attention_op
from vlcache_jax.kernels.column_statistics import ColumnStatistics
from vlcache_jax.kernels.decode_attention import Segments, Store
from vlcache_jax.state import PackedStore, RecentQueries, TailStore

MODEL_AXIS = "model"
"""The mesh axis over which projections and KV heads are split."""

_CHOICES = {
    "attention": ("splash_tpu", "cudnn", "xla", "reference"),
    "column_statistics": ("pallas_tpu", "xla", "xla_columns", "reference"),
    "decode_attention": ("pallas_tpu", "pallas_gpu", "xla", "reference"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which implementation of each op to use: None for the best of the platform the program is compiled for.

    Attributes:
      attention: of the prefill: "splash_tpu", "cudnn", "xla", "reference", or a tuple of names, the first that serves.
      column_statistics: "pallas_tpu", "xla", "xla_columns" or "reference".
      decode_attention: "pallas_tpu", "pallas_gpu", "xla" or "reference".

    Raises:
      InputError: a name that does not exist.

    Example:
      out = vlc.generate(model, params, batch, policy, kernels=vlc.Kernels(attention=("cudnn", "xla")))
    """

    attention: str | tuple[str, ...] | None = None
    column_statistics: str | None = None
    decode_attention: str | None = None

    def __post_init__(self) -> None:
        for op, choices in _CHOICES.items():
            value = getattr(self, op)
            names = value if isinstance(value, tuple) else () if value is None else (value,)
            for name in names:
                if name not in choices:
                    near = difflib.get_close_matches(str(name), choices, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise InputError(f"Kernels({op}={name!r}): use one of {', '.join(choices)}, or None{hint}")


def on_mesh_of(params: Any, *others: Any) -> AbstractContextManager[Any]:
    """Enters the mesh that the parameters lie on, unless there is one already or a program is being traced."""
    leaves = jax.tree.leaves((params, others))
    if any(isinstance(x, jax.core.Tracer) for x in leaves) or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    for leaf in leaves:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            automatic = all(kind == AxisType.Auto for kind in sharding.mesh.axis_types)
            return jax.set_mesh(sharding.mesh) if automatic else contextlib.nullcontext()  # type: ignore[arg-type]
    return contextlib.nullcontext()


def attention(
    kernels: Kernels, query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, *, with_lse: bool
) -> tuple[jax.Array, jax.Array | None]:
    """`kernels.attention.attention` of right-padded prompts."""

    def run(query, key, value, lengths):
        return attention_op.attention(
            query, key, value, lengths=lengths, with_lse=with_lse, implementation=kernels.attention
        )

    rows, heads = _axes(key.shape[0], key.shape[2])
    split = PartitionSpec(rows, None, heads)
    lse = split if with_lse else None
    return _local(run, (split, split, split, PartitionSpec(rows)), (split, lse))(query, key, value, lengths)


def column_statistics(
    kernels: Kernels,
    query: jax.Array,
    key: jax.Array,
    first: jax.Array,
    count: jax.Array,
    lse: jax.Array | None,
    **options: Any,
) -> ColumnStatistics:
    """`kernels.column_statistics.column_statistics`."""

    def run(query, key, first, count, lse):
        return column_statistics_op.column_statistics(
            query, key, first, count, lse=lse, implementation=kernels.column_statistics, **options
        )

    rows, heads = _axes(key.shape[0], key.shape[2])
    split, row = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    inputs = (split, split, row, row, None if lse is None else split)
    column = PartitionSpec(rows, heads)
    outputs: Any = ColumnStatistics(column, column, lse=split, maximum=split, column_maximum=column)  # type: ignore[arg-type]
    return _local(run, inputs, outputs)(query, key, first, count, lse)


def union_attention(
    kernels: Kernels, query: jax.Array, parts: Sequence[tuple[Store, Segments]]
) -> tuple[jax.Array, jax.Array]:
    """`kernels.decode_attention.union_attention`."""

    def run(query, parts):
        return decode_attention_op.union_attention(query, parts, implementation=kernels.decode_attention)

    rows, heads = _axes(query.shape[0], parts[0][0].lanes)
    split = PartitionSpec(rows, heads)

    def place(part: tuple[Store, Segments]) -> tuple[Any, Any]:
        store, segments = part
        shared = segments.lengths.shape[1] == 1
        return jax.tree.map(lambda _: split, store), jax.tree.map(
            lambda _: PartitionSpec(rows, None if shared else heads), segments
        )

    return _local(run, (split, [place(part) for part in parts]), (split, split))(query, list(parts))


def pack(
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    order: jax.Array,
    slots: jax.Array,
    pool: int,
    room: int | None = None,
) -> PackedStore:
    """`packing.pack`."""
    rows, heads = _axes(keys.shape[1], keys.shape[2])
    shared = PartitionSpec(None, rows)

    def per_head(x: jax.Array) -> PartitionSpec:
        return PartitionSpec(None, rows, heads) if x.shape[2] > 1 else shared

    def run(keys, values, positions, order, slots):
        return packing.pack(keys, values, positions, order, slots, pool, room)

    split, row = PartitionSpec(rows, heads), PartitionSpec(rows)
    store: Any = PackedStore(*[split] * 3, *[row] * 2)  # type: ignore[arg-type]
    inputs = (per_head(keys), per_head(values), per_head(positions), per_head(order), shared)
    return _local(run, inputs, store)(keys, values, positions, order, slots)


def recompress(
    function: Callable[..., tuple[jax.Array, ...]],
    context: PackedStore,
    tail: TailStore,
    observed: RecentQueries,
    next_position: jax.Array,
) -> tuple[jax.Array, ...]:
    """`recompression.recompress`, on each device's rows and heads."""
    rows, heads = _axes(tail.keys.shape[0], context.keys.shape[1])
    split, row = PartitionSpec(rows, heads), PartitionSpec(rows)

    def place(tree: Any) -> Any:  # as `planning.placement.place_state` does
        return jax.tree_util.tree_map_with_path(
            lambda path, _: row if path[-1].name in ("offsets", "lengths", "length") else split, tree
        )

    inputs = (*(place(tree) for tree in (context, tail, observed)), row)
    return _local(function, inputs, (split,) * 3)(context, tail, observed, next_position)


def split(buffers: jax.Array) -> jax.Array:
    """Places [batch, lanes, ...] over the mesh as the ops expect it."""
    rows, heads = _axes(*buffers.shape[:2])
    return buffers if rows is heads is None else jax.lax.with_sharding_constraint(buffers, PartitionSpec(rows, heads))


def _axes(rows: int, heads: int) -> tuple[tuple[str, ...] | None, str | None]:
    """The mesh axes over which rows and heads are split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None, None
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    free = {name: size for name, size, kind in kinds if kind != AxisType.Manual}  # not those of an outer shard_map
    over = tuple(name for name in free if name != MODEL_AXIS)
    split_rows = over and rows % math.prod(free[name] for name in over) == 0
    split_heads = MODEL_AXIS in free and heads % free[MODEL_AXIS] == 0
    return over if split_rows else None, MODEL_AXIS if split_heads else None


def _local(function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function` on each device's part, or as it is where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(kind == AxisType.Manual for kind in mesh.axis_types):
        return function
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)
