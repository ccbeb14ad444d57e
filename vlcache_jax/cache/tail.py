"""The generated tokens of an answer, apart from the context so that it may be shared.

keys[b, h]   | layer 0: t0 t1 t2 .......... | layer 1: t0 t1 t2 .......... | ...
                         <-> length             <-> capacity for each layer
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlcache_jax.cache.geometry import align, regular_slots
from vlcache_jax.cache.store import lanes_spec, split
from vlcache_jax.files.exporting import exportable
from vlcache_jax.typing import ModelSpec


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class TailStore:
    """The generated tokens that are not in the context.

    Attributes:
      keys: [batch, kv_heads, slots, head_dim], rotated; slots is layers * capacity, or a little more
        (`regular_slots`).
      values: like `keys`.
      length: i32 [batch]. Tokens of each row appended so far, or since the context last took them in: a row appends at
        a slot of its own.
      capacity: slots of a layer (static).
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, spec: ModelSpec, batch: int, tokens: int) -> "TailStore":
        """Room for `tokens` tokens of each row."""
        capacity = int(align(tokens))
        shape = (batch, spec.num_kv_heads, regular_slots(spec.num_layers, capacity), spec.head_dim)
        zeros = split(jnp.zeros(shape, spec.dtype))
        return cls(zeros, zeros, jnp.zeros((batch,), jnp.int32), capacity)

    def partition_specs(self) -> "TailStore":
        """See `PackedStore.partition_specs`."""
        spec = lanes_spec(*self.keys.shape[:2])
        return dataclasses.replace(self, keys=spec, values=spec, length=PartitionSpec(spec[0]))  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all its buffers."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))
