"""The mesh of a run, checked, and the shapes of a run on it: where they lie, `parallel` says."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from vlcache_jax.errors import InputError
from vlcache_jax.parallel.mesh import DATA_AXIS, MODEL_AXIS, specs_of
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.planning.compiling import abstract


def default_axes(devices: int, kv_heads: int) -> dict[str, int]:
    """As much tensor parallelism as the KV heads can be divided by; the batch is split over what is left.

    Example:
      >>> default_axes(8, kv_heads=8), default_axes(16, kv_heads=8)
      ({'data': 1, 'model': 8}, {'data': 2, 'model': 8})
    """
    model = math.gcd(devices, kv_heads)
    return {DATA_AXIS: devices // model, MODEL_AXIS: model}


def check_axes(axes: Mapping[str, int], devices: int, kv_heads: int, batch: int) -> dict[str, int]:
    """Both axes, in order.

    Raises:
      InputError: an unknown axis, a size that does not divide what it splits, or devices left over.
    """
    unknown = set(axes) - {DATA_AXIS, MODEL_AXIS}
    if unknown:
        raise InputError(f"mesh axis {sorted(unknown)[0]!r} is not known: use data (the batch) and model (the heads)")
    sizes = {name: axes.get(name, 1) for name in (DATA_AXIS, MODEL_AXIS)}
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    default = ",".join(f"{name}={size}" for name, size in default_axes(devices, kv_heads).items())
    if any(type(size) is not int or size < 1 for size in sizes.values()) or math.prod(sizes.values()) != devices:
        raise InputError(
            f"mesh {text} does not use the {devices} devices of the slice: their product must; try {default}"
        )
    if kv_heads % sizes[MODEL_AXIS]:
        raise InputError(
            f"mesh {text}: the model's {kv_heads} KV heads cannot be split {sizes[MODEL_AXIS]} ways; try {default}"
        )
    if batch % sizes[DATA_AXIS]:
        raise InputError(
            f"batch={batch} cannot be split over {sizes[DATA_AXIS]} groups of devices (mesh {text}): give a multiple "
            f"of {sizes[DATA_AXIS]}, or another mesh"
        )
    return sizes


def place_params(params: Any, mesh: Mesh) -> Any:
    """Abstract parameters, split as `vlcache_jax.load(mesh=...)` does."""
    return abstract(params, mesh, param_shardings(params, mesh))


def place(tree: Any, mesh: Mesh) -> Any:
    """An abstract batch, state or result, its arrays where programs put them (`parallel.mesh.specs_of`)."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.tree.map(lambda x, spec: abstract(x, mesh, spec), tree, specs_of(tree))
