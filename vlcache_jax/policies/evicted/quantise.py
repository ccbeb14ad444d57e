"""`Quantise`: evicted tokens stay at fewer bits, in a store of their own."""

import dataclasses

import jax.numpy as jnp

from vlcache_jax.cache.geometry import align, capacity, regular_slots, segment_alignment
from vlcache_jax.cache.packing import Selected
from vlcache_jax.cache.store import PackedStore
from vlcache_jax.errors import PolicyError
from vlcache_jax.kernels.precision import PRECISIONS
from vlcache_jax.policies.budget import Bytes
from vlcache_jax.policies.evicted.rule import Evicted
from vlcache_jax.policies.parts import Parts
from vlcache_jax.policies.precision import check_bits


@dataclasses.dataclass(frozen=True)
class Quantise(Evicted):
    """They stay at fewer bits than the kept ones, in a store of their own (`KVState.more`).

    That store has room for as many as there can be: all tokens of all layers, less what the layers keep in any case
    (`Allocate.least`).

    Attributes:
      bits: 8, 4 or 2, or another word of `PRECISIONS`.
    """

    bits: int | str = 2
    saves = True
    keeps_others = True

    def __post_init__(self) -> None:
        check_bits("Quantise: bits", self.bits)

    def check(self, policy: Parts) -> None:
        if policy.bits is not None and PRECISIONS[self.bits].width >= PRECISIONS[policy.bits].width:
            raise PolicyError(
                f"{policy.name}: evicted=Quantise({self.bits}) is not below bits={policy.bits} of the kept tokens: "
                "give fewer bits to the others, or more to the kept ones"
            )
        if isinstance(policy.budget, Bytes):
            raise PolicyError(
                f"{policy.name}: budget={policy.budget} cannot be promised with evicted=Quantise({self.bits}), which "
                "keeps all of a prompt of any length: give a fraction or tokens, or use Drop()"
            )

    def stores(self, selected: Selected, layers: int, kept: int) -> tuple[PackedStore, ...]:
        group, length, alignment = selected.group, selected.keys.shape[3], segment_alignment(self.bits)
        pool = regular_slots(group * layers, int(align(length, alignment)))
        pool = min(pool, capacity(group * (layers * length - kept), group * layers, alignment))
        left = jnp.expand_dims(selected.lengths, range(2, selected.slots.ndim)) - selected.slots
        if selected.windowed is not None:
            left = jnp.where(jnp.expand_dims(selected.windowed, range(1, left.ndim)), 0, left)
        assert selected.others is not None
        return (dataclasses.replace(selected, order=selected.others, slots=left).pack(pool, self.bits),)
