"""Where tokens are dropped, and how long the rows of each stage are: static, decided before anything is traced."""

import dataclasses

import jax
import numpy as np

from vlcache_jax.errors import InputError, PolicyError
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.text.buckets import bucket_length
from vlcache_jax.parallel.mesh import is_known
from vlcache_jax.pruning.method import Pruning
from vlcache_jax.typing import ModelSpec


@dataclasses.dataclass(frozen=True)
class Plan:
    """A static argument of the prefill.

    Attributes:
      pruning: the method; None for one stage of all layers.
      starts: the first layer of every stage.
      rooms: the padded length of every stage.
    """

    pruning: Pruning | None
    starts: tuple[int, ...]
    rooms: tuple[int, ...]

    def sizes(self, layers: int) -> list[int]:
        """How many of a model's layers every stage has."""
        return [end - start for start, end in zip(self.starts, (*self.starts[1:], layers))]


def plan(pruning: Pruning | None, spec: ModelSpec, batch: Batch) -> Plan:
    """The plan for a batch: its rooms are those that the method has, or the buckets of what the rows keep.

    Raises:
      PolicyError: no pruning method, cuts or numbers of tokens out of order, rooms that are none, or a model of which
        layers have windows.
      InputError: a row keeps more tokens than the method's `rooms` hold.
    """
    if pruning is None:
        return Plan(None, (0,), (batch.length,))
    if not isinstance(pruning, Pruning):
        raise PolicyError(f"pruning={pruning!r} is not a pruning method: build one, for example PyramidDrop()")
    if spec.windows:
        raise PolicyError(
            f"{pruning.name}: layers of this model have windows, which count tokens of the prompt: it runs without "
            "pruning only"
        )
    cuts = pruning.cuts(spec.num_layers)
    if list(cuts) != sorted(set(cuts)) or any(not 0 <= cut < spec.num_layers for cut in cuts):
        raise PolicyError(
            f"{pruning.name} drops tokens behind layers {cuts}: give rising numbers below the model's "
            f"{spec.num_layers} layers"
        )
    rooms, needed = pruning.rooms, _needed(pruning, len(cuts), batch)
    if rooms is not None:
        if len(rooms) != len(cuts) or min(rooms, default=1) < 1:
            raise PolicyError(f"{pruning.name}: rooms={rooms} for {len(cuts)} cuts: give a padded length for each")
        for cut, (room, most) in enumerate(zip(rooms, needed)):
            if most > room:
                raise InputError(
                    f"{pruning.name}: a row keeps {most} tokens behind {cuts[cut]} layers, but rooms={rooms}: give "
                    "more, or None"
                )
    else:
        rooms = tuple(map(bucket_length, needed)) or (batch.length,) * len(cuts)
    bounded = np.minimum.accumulate([batch.length, *rooms]).tolist()
    return Plan(pruning, (0, *cuts), tuple(bounded))


def _needed(pruning: Pruning, cuts: int, batch: Batch) -> list[int]:
    """Tokens of the longest row behind every cut; nothing where the batch's numbers are not known."""
    if not (is_known(batch.lengths) and is_known(batch.vision_index)):
        return []
    lengths, vision_index = (np.asarray(jax.device_get(x)) for x in (batch.lengths, batch.vision_index))
    before_last = np.arange(batch.length) < lengths[:, None] - 1
    visual = np.sum((vision_index != TEXT) & before_last, axis=1)
    most = list(map(int, visual))
    longest = []
    for cut in range(cuts):
        kept = [pruning.kept(cut, int(n)) for n in visual]
        if any(not 0 <= k <= m for k, m in zip(kept, most)):
            raise PolicyError(f"{pruning.name} keeps {kept} visual tokens at cut {cut}, of {most}: it can only drop")
        most = kept
        longest.append(int(np.max(lengths - visual + kept)))
    return longest
