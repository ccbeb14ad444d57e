"""Where each parameter lies on a mesh: split over the axes named "model" (tensor parallelism) and "fsdp"."""

from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlcache_jax.parallel.mesh import FSDP_AXIS, MODEL_AXIS

# Which axis of a parameter is split, counted from its end: columns of projections that widen, rows of those that
# narrow, so that a layer needs one reduction after attention and one after the MLP.
_SPLIT_AXIS = {
    "query": -1, "key": -1, "value": -1, "gate": -1, "up": -1, "fc1": -1, "output": -2, "down": -2, "fc2": -2,
    "lm_head": -1, "linear_1": -1, "linear_2": -2,
}  # fmt: skip
_ROW_SPLIT_BIAS_REPLICATED = ("output", "down", "fc2", "linear_2")


_OF_ADAPTERS = {"lora_a": -2, "lora_b": -1}  # which side of a split kernel is split in its adapter, too


def param_shardings(abstract_params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """A `NamedSharding` for every parameter of a LLaVA.

    Projections are split over the mesh axis "model" if the mesh has one and the size is a multiple of it. Over an axis
    "fsdp", for training, the largest other side of every matrix is split, too, if the size is a multiple of it; the
    compiler gathers a layer's weights when it runs. Everything else is whole on every device. Other axes of the mesh
    (for the batch) see whole parameters. Axes may be of any type.

    Args:
      abstract_params: nested dict of `jax.ShapeDtypeStruct`, for example `model.abstract_params()`.
      mesh: the mesh.

    Returns:
      Nested dict like `abstract_params`.

    Example:
      mesh = jax.make_mesh((2, 4), ("data", "model"))
      shardings = param_shardings(model.abstract_params(), mesh)
    """
    size, fsdp = mesh.shape.get(MODEL_AXIS, 1), mesh.shape.get(FSDP_AXIS, 1)
    flat = traverse_util.flatten_dict(abstract_params)

    def place(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        codes, scales = (flat.get((*path[:-1], name)) for name in ("codes", "scales"))
        if codes is not None and path[-1] in ("codes", "scales", "zeros"):
            specs = coded_specs(path[-2], codes.shape, scales.shape, size)
            return NamedSharding(mesh, specs[0 if path[-1] == "codes" else 1])
        spec: list[str | None] = [None] * len(leaf.shape)
        axis = _SPLIT_AXIS.get(path[-2] if len(path) > 1 else "")
        if path[-1] == "bias" and axis is not None:
            axis = None if path[-2] in _ROW_SPLIT_BIAS_REPLICATED else -1
        if path[-1] in _OF_ADAPTERS and axis != _OF_ADAPTERS[path[-1]]:
            axis = None  # the rank is on every device
        if axis is not None and size > 1 and leaf.shape[axis] % size == 0:
            spec[axis] = MODEL_AXIS
        # Of a matrix: without the axis of layers, and not an adapter, which is small.
        sides = range(-len(leaf.shape) + ("layers" in path), 0)
        if fsdp > 1 and len(sides) > 1 and path[-1] not in _OF_ADAPTERS:
            free = [i for i in sides if spec[i] is None and leaf.shape[i] % fsdp == 0]
            if free:
                spec[max(free, key=lambda i: leaf.shape[i])] = FSDP_AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return traverse_util.unflatten_dict({path: place(path, leaf) for path, leaf in flat.items()})


def coded_specs(
    name: str, codes: tuple[int, ...], scales: tuple[int, ...], size: int
) -> tuple[PartitionSpec, PartitionSpec]:
    """Where the codes [..., channels, features] and scales [..., groups, features] of a projection lie.

    As its kernel would, but that groups stay whole: where channels cannot be split so, features are.

    Args:
      name: of the projection.
      codes, scales: their shapes.
      size: of the axis "model".
    """
    (*lead, channels, features), groups = codes, scales[-2]
    axis = _SPLIT_AXIS.get(name)
    if axis == -2 and (channels % size or (groups > 1 and groups % size)):
        axis = -1
    rows, columns = (MODEL_AXIS if axis == i and size > 1 else None for i in (-2, -1))
    columns = None if features % size else columns
    whole = [None] * len(lead)
    return PartitionSpec(*whole, rows, columns), PartitionSpec(*whole, rows if groups > 1 else None, columns)
