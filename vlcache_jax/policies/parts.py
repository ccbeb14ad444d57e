"""What the parts of a policy may ask about one another when it is made."""

from typing import Any, Protocol

from vlcache_jax.policies.allocate.uniform import Allocate
from vlcache_jax.policies.budget import Budget
from vlcache_jax.policies.scores.attention import Score
from vlcache_jax.policies.window import Recent


class Parts(Protocol):
    """`policies.policy.Policy`, which imports the rules that are checked against it."""

    @property
    def name(self) -> str: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def score(self) -> Score: ...
    @property
    def allocate(self) -> Allocate: ...
    @property
    def recent(self) -> Recent: ...
    @property
    def sinks(self) -> int: ...
    @property
    def protect(self) -> str | None: ...
    @property
    def candidate_fraction(self) -> float | None: ...
    @property
    def bits(self) -> int | str | None: ...
    @property
    def evicted(self) -> Any: ...  # an `Evicted`
