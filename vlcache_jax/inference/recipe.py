"""A recipe: everything that makes a model cheaper on a prompt, as one value and as one text."""

import dataclasses
from typing import Any

from vlcache_jax.errors import PolicyError
from vlcache_jax.patterns.grammar import pattern_by_name
from vlcache_jax.patterns.pattern import PATTERNS, Pattern
from vlcache_jax.policies.budget import policy_text
from vlcache_jax.policies.grammar import policy_by_name
from vlcache_jax.policies.methods.full_cache import FullCache
from vlcache_jax.policies.methods.method import METHODS as POLICIES
from vlcache_jax.policies.policy import Policy
from vlcache_jax.pruning.grammar import pruning_by_name
from vlcache_jax.pruning.method import METHODS as PRUNINGS
from vlcache_jax.pruning.method import Pruning
from vlcache_jax.terminal import words


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is kept of a prompt's cache, which keys its queries look at, and which visual tokens go on.

    Frozen and hashable, a static argument of the programs. Whatever takes a policy takes a recipe, too: `generate`,
    `compress`, `Engine`, `plan` and others.

    Attributes:
      policy: what to keep; `FullCache()` by default.
      prefill: which keys the prompt's queries look at; None for all.
      pruning: which visual tokens go on from layer to layer; None for all.

    Raises:
      PolicyError: a part that is none, or parts that cannot work together.

    Example:
      >>> from vlcache_jax import Feather, VLCache, XAttention
      >>> recipe = Recipe(VLCache(0.1), prefill=XAttention(0.9), pruning=Feather())
      >>> recipe == recipe_by_name("vl_cache:0.1 + x_attention:0.9 + feather")
      True
    """

    policy: Policy = dataclasses.field(default_factory=FullCache)
    prefill: Pattern | None = None
    pruning: Pruning | None = None

    def __post_init__(self) -> None:
        for name, kind, what, example in (
            ("policy", Policy, "a policy", "VLCache(budget=0.1)"),
            ("prefill", Pattern | None, "a pattern", "AShape()"),
            ("pruning", Pruning | None, "a pruning method", "PyramidDrop()"),
        ):
            if not isinstance(value := getattr(self, name), kind):  # type: ignore[arg-type]
                raise PolicyError(f"{name}={value!r} is not {what}: build one, for example {example}")
        if self.policy.repeats and (self.prefill is not None or self.pruning is not None):
            raise PolicyError(
                f"policy {self.policy.name!r} has prompts said twice, which goes with neither prefill={self.prefill} "
                f"nor pruning={self.pruning}: leave these out, or use another policy"
            )
        if self.prefill is not None and self.pruning is not None and (why := self.prefill.needs_whole_images):
            raise PolicyError(
                f"prefill={self.prefill.name} with pruning={self.pruning.name}: {why}, and of pruned images some are "
                "missing: use another pattern, for example XAttention(), or leave pruning out"
            )

        if self.pruning is not None and self.policy.rule.whole_prompts:
            raise PolicyError(
                f"policy={self.policy.name} with pruning={self.pruning.name}: decoding={self.policy.rule} notes "
                "something of every token of a prompt in every layer, and later layers lack some: use "
                "decoding=Append(), or leave pruning out"
            )

    @property
    def title(self) -> str:
        """For people: "vl_cache 10 % + XAttention + Feather"."""
        parts = [part.name for part in (self.prefill, self.pruning) if part is not None]
        return " + ".join([policy_text(self.policy.name, self.policy.budget), *parts])


def recipe_of(policy: Policy | Recipe | None, prefill: Pattern | None = None, pruning: Pruning | None = None) -> Recipe:
    """The recipe that the arguments of `generate` mean.

    Raises:
      PolicyError: see `Recipe`; or a recipe, and parts of it besides.
    """
    if not isinstance(policy, Recipe):
        return Recipe(FullCache() if policy is None else policy, prefill, pruning)
    if prefill is not None or pruning is not None:
        name = "pruning" if prefill is None else "prefill"
        raise PolicyError(f"a recipe says all by itself: give {name} in the recipe, or a policy in its place")
    return policy


def recipe_by_name(text: str) -> Recipe:
    """The recipe that a text names, on the command line and in configuration files.

    Args:
      text: a policy, a pattern and a pruning method as they are typed (`policy_by_name`, `pattern_by_name`,
        `pruning_by_name`), or some of them, in any order, with "+" between them:
        "vl_cache:0.1", "vl_cache:0.1 + feather,keep=0.3/0.09", "snap_kv:256,window=16 + fast_v:0.25 + x_attention:0.9".
        Without a policy the whole cache is kept.

    Raises:
      PolicyError: a name that is none of them, with the nearest, two parts of a kind, or see `Recipe`.

    Example:
      >>> recipe_by_name("fast_v:0.25").pruning
      FastV(rooms=None, layer=2, keep=0.25)
    """
    kinds: dict[str, tuple[Any, Any]] = {"policy": (POLICIES, policy_by_name), "prefill": (PATTERNS, pattern_by_name)}
    kinds["pruning"] = (PRUNINGS, pruning_by_name)
    found: dict[str, str] = {}
    for part in text.split("+"):
        name = part.partition(",")[0].partition(":")[0].strip()
        kind = next((kind for kind, (known, _) in kinds.items() if name in known), None)
        if kind is None:
            known = [name for names, _ in kinds.values() for name in names]
            raise PolicyError(f"policy {words.shown(name)} does not exist{words.nearest(name, known)}")
        if kind in found:
            raise PolicyError(
                f"{words.shown(found[kind].strip())} and {words.shown(part.strip())} are both of the kind {kind}: "
                "give one of them"
            )
        found[kind] = part
    return Recipe(**{kind: kinds[kind][1](part.strip()) for kind, part in found.items()})
