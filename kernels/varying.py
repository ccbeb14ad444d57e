"""Types of values inside `jax.shard_map` with its default check_vma=True: over which mesh axes they vary.

There a loop's carry must have the type of what the body makes of it; one that starts from constants varies over no
axis, and must be marked.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType


def varying_axes(tree: Any) -> frozenset[str]:
    """The axes over which some array of a pytree varies; none outside of a checked `shard_map`."""
    types = (getattr(jax.typeof(x), "manual_axis_type", None) for x in jax.tree.leaves(tree))
    return frozenset().union(*(kind.varying for kind in types if kind is not None))


def varying(tree: Any, *like: Any) -> Any:
    """The arrays of `tree`, marked as varying over all axes over which those of `like` do.

    Example:
      total = jax.lax.fori_loop(0, n, lambda i, total: total + x[i], varying(jnp.zeros(()), x))
    """
    axes = varying_axes(like)

    def mark(x: Any) -> Any:
        missing = axes - varying_axes(x)
        return jax.lax.pcast(jnp.asarray(x), tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(mark, tree) if axes else tree


def is_checked() -> bool:
    """Whether this is traced inside a `shard_map` with check_vma=True."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = [name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Manual]
    return bool(manual) and bool(varying_axes(jax.lax.axis_index(manual[0])))


def refuse_if_checked(name: str) -> None:
    """Raises NotImplementedError for a Pallas implementation, which has no such types."""
    if is_checked():
        raise NotImplementedError(f"{name} needs check_vma=False in shard_map")
