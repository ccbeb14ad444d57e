"""Meshes: which one a program runs on, over which of its axes rows and heads are split, and axes of every type.

Rows are split over all axes but "model", heads over "model", each where the size divides. Programs are written for
axes of the type Auto, where the compiler shares out what no op shares out itself. Where a user's mesh has Explicit axes
(what `jax.make_mesh` gives), they run under an Auto view of it (`automatic`); Manual axes, those of a `jax.shard_map`
that the user is inside, are left to the user.
"""

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from vlcache_jax.errors import InputError
from vlcache_jax.kernels.varying import is_checked

MODEL_AXIS = "model"
"""The mesh axis over which projections and KV heads are split."""
FSDP_AXIS = "fsdp"
"""The mesh axis over which parameters are split as well as the batch: each layer's are gathered when it runs."""
DATA_AXIS = "data"
"""The usual name of the axis over which the batch is split; any axis but "model" will do."""


def on_mesh_of(params: Any, *others: Any) -> AbstractContextManager[Any]:
    """Enters the mesh that the parameters lie on, unless there is one already or a program is being traced."""
    leaves = jax.tree.leaves((params, others))
    if any(isinstance(x, jax.core.Tracer) for x in leaves) or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    for leaf in leaves:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return jax.set_mesh(sharding.mesh)  # type: ignore[arg-type]
    return contextlib.nullcontext()


def is_known(x: Any) -> bool:
    """Whether this process can read the values: x is not being traced, and no part of it lies only with another one."""
    if not isinstance(x, jax.Array):
        return True
    return not isinstance(x, jax.core.Tracer) and (x.is_fully_addressable or x.is_fully_replicated)


def on_every_process(tree: Any) -> Any:
    """A pytree of small results, those gathered of which parts lie with other processes; all must call it."""
    leaves, structure = jax.tree.flatten(tree)
    apart = [i for i, x in enumerate(leaves) if not isinstance(x, jax.core.Tracer) and not is_known(x)]
    if not apart:
        return tree
    meshes = [leaves[i].sharding.mesh for i in apart]
    places = [NamedSharding(mesh, PartitionSpec()) for mesh in meshes]
    with jax.set_mesh(meshes[0]) if jax.sharding.get_abstract_mesh().empty else contextlib.nullcontext():
        gathered = jax.jit(lambda arrays: arrays, out_shardings=places)([leaves[i] for i in apart])
    for i, x in zip(apart, gathered, strict=True):
        leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def check_known(x: Any, what: str) -> None:
    """Raises InputError if an array is being traced, or parts of it lie with other processes only."""
    if isinstance(x, jax.core.Tracer):
        raise InputError(f"{what} are not known while a program is traced: read them outside of jit")
    if not is_known(x):
        raise InputError(
            f"{what} lie with several processes: gather them on all of them first, with "
            "jax.experimental.multihost_utils.process_allgather(x, tiled=True)"
        )


def split_axes(rows: int, heads: int = 1) -> tuple[tuple[str, ...] | None, str | None]:
    """The mesh axes over which so many rows and heads are split; None where they are not."""
    free = free_axes()
    over = tuple(name for name in free if name != MODEL_AXIS)
    split_rows = over and rows % math.prod(free[name] for name in over) == 0
    split_heads = MODEL_AXIS in free and heads % free[MODEL_AXIS] == 0
    return over if split_rows else None, MODEL_AXIS if split_heads else None


def axis_size(axis: str | None) -> int:
    """Devices along an axis of the mesh; 1 for None."""
    return jax.sharding.get_abstract_mesh().shape[axis] if axis else 1


def local(function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function` on each device's part of its arguments, or as it is where there is no mesh.

    Args:
      function: of arrays; nothing in it may need another device.
      inputs: a `PartitionSpec`, or a prefix of such a tree, for every argument; see `split_axes`.
      outputs: the same for the result.
    """
    free = free_axes()
    if not free or is_checked():  # where no Pallas kernel runs, the compiler shares out the rest
        return function
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, axis_names=set(free), check_vma=False)


def by_row(function: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """`function` on each device's rows; of all its arguments and results, pytrees of arrays, the first axis is rows."""
    place = PartitionSpec(split_axes(rows)[0])
    return local(function, place, place)


def refuse_partly_checked() -> None:
    """Raises InputError inside a checked `jax.shard_map` over some axes of a mesh only: JAX cannot search there."""
    if is_checked() and free_axes():
        raise InputError(
            f"inside jax.shard_map over some of the mesh's axes only ({', '.join(map(repr, free_axes()))} left to the "
            "compiler) JAX cannot check what a compressing prefill does: pass check_vma=False, or map over all axes"
        )


def free_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh that are not those of an outer `shard_map`; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind != AxisType.Manual}


def rows_over(params: Any) -> int:
    """Devices over which the mesh of the parameters splits rows."""
    with on_mesh_of(params):
        return math.prod(size for name, size in free_axes().items() if name != MODEL_AXIS)


Places = Callable[[Any, Any], Any]


def automatic(function: Callable[..., Any], places: Places | None = None) -> Callable[..., Any]:
    """`function` with the Explicit axes of the mesh as Auto ones.

    Its arguments, pytrees or static ones, keep the place they have; its results are typed by the Explicit mesh again.
    On such a mesh a function that is not traced already is compiled.

    Args:
      function: of any arguments.
      places: (arguments, results) -> a `PartitionSpec` for every result; as `specs_of` says by default.
    """

    def traced(args: Any, kwargs: Any, mesh: AbstractMesh) -> Any:
        kinds = (AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types)
        view = mesh.update(axis_types=tuple(kinds))

        def as_auto(x: Any) -> Any:
            return jax.sharding.reshard(x, NamedSharding(view, PartitionSpec(*[None] * x.ndim))) if _array(x) else x

        typed = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit}

        def as_explicit(x: Any, spec: PartitionSpec) -> Any:
            axes = [tuple(a for a in _names(entry) if a in typed) or None for entry in spec]
            return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*axes))) if _array(x) else x

        with jax.sharding.use_abstract_mesh(view):
            inside, options = jax.tree.map(as_auto, (args, kwargs))
            out = function(*inside, **options)
            specs = places(args, out) if places else specs_of(out)
            return jax.tree.map(as_explicit, out, specs)

    @partial(jax.jit, static_argnums=(1, 2, 3))
    def compiled(arrays: list[Any], static: tuple[Any, ...], structure: Any, mesh: AbstractMesh) -> Any:
        leaves, numbers = list(static), iter(arrays)
        args, kwargs = structure.unflatten([next(numbers) if x is _DYNAMIC else x for x in leaves])
        return traced(args, kwargs, mesh)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        mesh = _explicit_mesh((args, kwargs))
        if mesh is None:
            return function(*args, **kwargs)
        leaves, structure = jax.tree.flatten((args, kwargs))
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return traced(args, kwargs, mesh)
        arrays = [x for x in leaves if isinstance(x, jax.Array | np.ndarray)]
        static = tuple(_DYNAMIC if isinstance(x, jax.Array | np.ndarray) else x for x in leaves)
        return compiled(arrays, static, structure, mesh)

    return run


def _names(entry: Any) -> tuple[str, ...]:
    """The axes of an entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


_DYNAMIC = object()  # in the place of an array


def _explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh of the context, or else of the arrays, if one of its axes is Explicit."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree) if _array(x))
        mesh = next((m for m in meshes if not m.empty), mesh)
    return mesh if AxisType.Explicit in mesh.axis_types else None


def _array(x: Any) -> bool:
    return isinstance(x, jax.Array)


def specs_of(tree: Any) -> Any:
    """Where the arrays of a batch, a state or a result lie, a `PartitionSpec` for each.

    As their class says, in a method `partition_specs()`; the rows of all others are split.
    """

    def place(x: Any) -> Any:
        if hasattr(x, "partition_specs"):
            return x.partition_specs()
        return PartitionSpec(split_axes(x.shape[0])[0]) if np.ndim(x) else PartitionSpec()

    return jax.tree.map(place, tree, is_leaf=lambda x: hasattr(x, "partition_specs"))
