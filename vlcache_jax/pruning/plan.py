"""Where tokens are dropped, and how long the rows of each stage are: static, decided before anything is traced."""

import dataclasses
from typing import Any

import jax
import numpy as np

from vlcache_jax.errors import InputError, PolicyError
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.text.buckets import bucket_length
from vlcache_jax.parallel.mesh import is_known
from vlcache_jax.pruning.grid import grid_of
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

    @property
    def needs_tower(self) -> bool:
        """Whether prompts are embedded with what the tower says of them."""
        return self.pruning is not None and self.pruning.needs_tower and len(self.starts) > 1

    def sizes(self, layers: int) -> list[int]:
        """How many of a model's layers every stage has."""
        return [end - start for start, end in zip(self.starts, (*self.starts[1:], layers))]


def fitted(pruning: Pruning, spec: ModelSpec) -> Pruning:
    """The method for a model.

    Raises:
      PolicyError: it does not fit: cuts out of order, rooms that are none, a model of which layers have windows, or one
        that does not tell what the method needs.
    """
    pruning = pruning.of_model(spec.num_layers)
    if spec.windows:
        raise PolicyError(
            f"{pruning.name}: layers of this model have windows, which count tokens of the prompt: it runs without "
            "pruning only"
        )
    if pruning.needs_tower and spec.tower_attention is None:
        raise PolicyError(
            f"{pruning.name} needs the attention of the vision tower, of which this model tells nothing: choose a "
            "method that looks at the decoder alone, for example Feather() or CDPruner()"
        )
    cuts = pruning.cuts(spec.num_layers)
    if list(cuts) != sorted(set(cuts)) or any(not 0 <= cut < spec.num_layers for cut in cuts):
        raise PolicyError(
            f"{pruning.name} drops tokens behind layers {cuts}: give rising numbers below the model's "
            f"{spec.num_layers} layers"
        )
    if pruning.looks_back and 0 in cuts:
        raise PolicyError(f"{pruning.name} goes by the layer before: it cannot drop in front of layer 0")
    nowhere = np.zeros((1, 3, 1), np.int32)
    if not (spec.vision_grid or spec.vision_merge) and any(
        pruning.protected(cut, nowhere) is not None for cut in range(len(cuts))
    ):
        raise PolicyError(
            f"{pruning.name} goes by rows and columns of visual tokens, which this model does not tell: leave the grid "
            "out, as Feather(stride=0) does"
        )
    rooms = pruning.rooms
    if rooms is not None and (len(rooms) != len(cuts) or min(rooms, default=1) < 1):
        raise PolicyError(f"{pruning.name}: rooms={rooms} for {len(cuts)} cuts: give a padded length for each")
    return pruning


def plan(pruning: Pruning | None, spec: ModelSpec, batch: Batch) -> Plan:
    """The plan for a batch: its rooms are those that the method has, or the buckets of what the rows keep.

    Raises:
      PolicyError: see `fitted`; or numbers of tokens out of order.
      InputError: a row keeps more tokens than the method's `rooms` hold.
    """
    if pruning is None:
        return Plan(None, (0,), (batch.length,))
    pruning = fitted(pruning, spec)
    cuts = pruning.cuts(spec.num_layers)
    rooms, needed = pruning.rooms, _needed(pruning, len(cuts), spec, batch)
    if rooms is not None:
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


def _needed(pruning: Pruning, cuts: int, spec: ModelSpec, batch: Batch) -> list[int]:
    """Tokens of the longest row behind every cut; nothing where the batch's numbers are not known."""
    cells = [] if batch.cells is None else [batch.cells]
    if not all(map(is_known, (batch.lengths, batch.vision_index, *cells))):
        return []
    batch = dataclasses.replace(batch, **{x: _numbers(getattr(batch, x)) for x in ("lengths", "vision_index", "cells")})
    lengths, grid = np.asarray(batch.lengths), grid_of(spec, batch, np)
    droppable = (np.asarray(batch.vision_index) != TEXT) & (np.arange(batch.length) < lengths[:, None] - 1)
    visual = np.sum(droppable, axis=1)
    most = list(map(int, visual))
    longest = []
    for cut in range(cuts):
        kept = [pruning.kept(cut, int(n), m) for n, m in zip(visual, most)]
        if any(not 0 <= k <= m for k, m in zip(kept, most)):
            raise PolicyError(f"{pruning.name} keeps {kept} visual tokens at cut {cut}, of {most}: it can only drop")
        besides = None if grid is None else pruning.protected(cut, grid)
        if besides is not None:
            kept = np.minimum(kept + np.sum(besides & droppable, axis=1), most).tolist()
        most = kept
        longest.append(int(np.max(lengths - visual + kept)))
    return longest


def _numbers(x: Any) -> Any:
    return None if x is None else np.asarray(jax.device_get(x))
