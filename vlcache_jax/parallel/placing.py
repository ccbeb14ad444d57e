"""Host arrays put where the parameters are, by an explicit transfer (`jax.transfer_guard` forbids others)."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def placed(tree: Any, params: Any) -> Any:
    """`tree` with its numpy arrays on the devices of the parameters, whole on each.

    Arrays of JAX stay where they are, and in a traced program everything does. Over several processes nothing is
    placed: there JAX takes numpy arrays as they are.
    """
    leaves = jax.tree.leaves((tree, params))
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return tree
    sharding = next((x.sharding for x in jax.tree.leaves(params) if isinstance(x, jax.Array) and x.committed), None)
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    if sharding is not None and not (sharding.is_fully_addressable and sharding.is_fully_replicated):
        return tree
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, sharding), tree)
