"""`Drop`: evicted tokens are gone."""

import dataclasses

from vlcache_jax.policies.evicted.rule import Evicted


@dataclasses.dataclass(frozen=True)
class Drop(Evicted):
    """They are gone."""
