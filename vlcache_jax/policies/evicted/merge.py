"""`Merge`: evicted tokens are merged into kept ones (`cache.merging`)."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.cache.merging import merge_evicted
from vlcache_jax.cache.packing import Selected
from vlcache_jax.errors import PolicyError
from vlcache_jax.policies.evicted.rule import Evicted
from vlcache_jax.policies.parts import Parts

MERGES = ("averaged", "pivotal", "weighted")


@dataclasses.dataclass(frozen=True)
class Merge(Evicted):
    """Each is merged into the kept token whose key is most like its own (LOOK-M, arXiv 2406.18139).

    For every KV head an evicted key goes to the kept key with the largest cosine similarity, ties to the lower
    position. With x a kept key, or the value beside it, and y_1 .. y_n those of the tokens that went to it:

        averaged  (x + sum y_i) / (n + 1)
        pivotal   (x + sum (y_i + x) / 2) / (n + 1)
        weighted  (x + sum c_i y_i) / (n + 1),   c_i the cosine of the keys, for values too

    Any kept token takes part, the recent ones and the sinks included; one that nothing went to stays as it is, bit for
    bit. Keys are merged as they are stored, rotated each at its own position, as in the authors' code.

    Attributes:
      kind: "averaged", "pivotal" (the authors' default) or "weighted".

    Raises:
      PolicyError: another kind.
    """

    kind: str = "pivotal"
    saves = True
    mixes = True

    def __post_init__(self) -> None:
        if self.kind not in MERGES:
            raise PolicyError(f"Merge({self.kind!r}) is not known: use {', '.join(MERGES)}")

    def check(self, policy: Parts) -> None:
        if policy.bits is not None:
            raise PolicyError(
                f"{policy.name}: bits={policy.bits} with evicted={self}: merged keys and values are averages, "
                "whose rounding no published method accounts for; use bits=None, or evicted=Drop()"
            )

    def applied(self, selected: Selected) -> Selected:
        order = selected.order
        keys, values = jax.lax.stop_gradient((selected.keys, selected.values))  # which goes where is a search
        merged = merge_evicted(keys, values, order, selected.lengths, self.kind)
        if selected.windowed is not None:  # what a window has left behind goes nowhere
            entry = jnp.minimum(order, order.shape[3] - 1)[..., None]
            plain = (jnp.take_along_axis(x, entry, axis=3) for x in (keys, values))
            here = selected.windowed[:, None, None, None, None]
            merged = jnp.where(here, next(plain), merged[0]), jnp.where(here, next(plain), merged[1])
        keys, values = merged
        sorted_already = jnp.broadcast_to(jax.lax.iota(jnp.int32, order.shape[3]), order.shape)
        return dataclasses.replace(selected, keys=keys, values=values, positions=order, order=sorted_already)
