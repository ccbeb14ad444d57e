"""What a mesh leaves whole although an axis could split it: said in the report, in the plan, and once as a warning."""

import math
import warnings
from collections.abc import Mapping, Sequence

from vlcache_jax.errors import PlacementWarning
from vlcache_jax.parallel.mesh import DATA_AXIS, FSDP_AXIS, MODEL_AXIS
from vlcache_jax.typing import ModelSpec

_OF_BATCH = (DATA_AXIS, FSDP_AXIS, "batch", "replica")  # names that promise no split of the heads


def replicated(
    axes: Mapping[str, int],
    spec: ModelSpec,
    *,
    rows: int | None = None,
    lanes: int | None = None,
    policy: str = "the policy",
) -> tuple[str, ...]:
    """A sentence with a remedy for each thing that every device along an axis holds, and computes, as a whole.

    Args:
      axes: of the mesh, without those of an outer `jax.shard_map`; none for no mesh.
      spec: of the model.
      rows: of the batch; None if there is no batch yet.
      lanes: of a store in which KV heads share lanes; None where each head has its own, or there is no store yet.
      policy: its name.

    Example:
      >>> spec = ModelSpec(num_layers=2, num_kv_heads=2, head_dim=8, max_positions=64, dtype="float32")
      >>> replicated({"data": 2, "model": 4}, spec)[0]
      "2 KV heads do not divide over the 4 devices of axis 'model': each holds all; make the axis a divisor of 2"
    """
    notes = []
    model, kv_heads = axes.get(MODEL_AXIS, 1), spec.num_kv_heads
    others = {name: size for name, size in axes.items() if name != MODEL_AXIS and size > 1}
    if MODEL_AXIS not in axes and any(name not in _OF_BATCH for name in others):
        notes.append(
            f"the mesh has the axes {', '.join(map(repr, others))}, none of them {MODEL_AXIS!r}: each device holds all "
            f"parameters and KV heads; name the axis that is to split them {MODEL_AXIS!r}, or those of the batch "
            f"{DATA_AXIS!r}"
        )
    if kv_heads % model:
        notes.append(
            f"{kv_heads} KV heads do not divide over the {model} devices of axis {MODEL_AXIS!r}: each holds all; make "
            f"the axis a divisor of {kv_heads}"
        )
    elif lanes is not None and lanes % model:
        notes.append(
            f"{policy} with lanes={lanes} has no lanes to divide over the {model} devices of axis "
            f"{MODEL_AXIS!r}: each holds the whole store; give lanes={model}, or a multiple"
        )
    split = math.prod(others.values())
    if rows is not None and rows > 1 and rows % split:  # a single row cannot be divided, and may serve all devices
        names = " and ".join(map(repr, others))
        notes.append(
            f"{rows} rows do not divide over the {split} devices of {names}: each holds all; give a multiple of {split}"
        )
    return tuple(notes)


def warn(notes: Sequence[str]) -> None:
    """A `PlacementWarning` for each note, which Python shows once."""
    for note in notes:
        warnings.warn(note, PlacementWarning, stacklevel=2)
