"""What becomes of the tokens that a layer does not keep: what a rule says and does at the end of prefill."""

import dataclasses

from vlcache_jax.cache.packing import Selected
from vlcache_jax.cache.store import PackedStore
from vlcache_jax.policies.parts import Parts


@dataclasses.dataclass(frozen=True)
class Evicted:
    """A rule: its configuration and its functions. Frozen and hashable.

    What it says of itself, in attributes or properties of these names, decides what it goes together with.

    Attributes:
      saves: whether it needs the tokens that are not kept, so that a layer must hand on all it has.
      mixes: whether kept keys and values are made from others', so that one that is not finite spoils them.
      keeps_others: whether it keeps the other tokens in stores of its own, and so needs `Selected.others`.
    """

    saves = False
    mixes = False
    keeps_others = False

    @property
    def bits(self) -> int | str | None:
        """The precision of those stores, a word of `PRECISIONS`; None for the model's dtype."""
        return None

    def check(self, policy: Parts) -> None:
        """Raises PolicyError if it cannot go with the rest of a policy; called when the policy is made."""

    def applied(self, selected: Selected) -> Selected:
        """What is kept, before it is packed."""
        return selected

    def stores(self, selected: Selected, layers: int, kept: int) -> tuple[PackedStore, ...]:
        """Further stores (`KVState.more`), of the `layers` that have no window, which keep `kept` slots at least."""
        return ()
