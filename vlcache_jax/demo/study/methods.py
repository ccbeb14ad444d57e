"""The grid: every policy that has a name, variants of some of them, and the yardsticks."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from vlcache_jax.demo.study.oracle import oracle, oracle_by_mass
from vlcache_jax.errors import InputError
from vlcache_jax.policies import POLICIES, Policy, policy_by_name
from vlcache_jax.policies.allocate.uniform import Uniform

FULL = "full_cache"
BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 1.0)

_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vl_cache_shared": ("vl_cache", {"heads": "shared"}),
    "vl_cache_pooled": ("vl_cache", {"pool": 5, "pooling": "max"}),
    "vl_cache_grid": ("vl_cache", {"pool": 3, "pooling": "max", "grid_side": "model"}),
    "vl_cache_uniform": ("vl_cache", {"allocate": Uniform()}),
    "vl_cache_int8": ("vl_cache", {"bits": 8}),
    "vl_cache_int4": ("vl_cache", {"bits": 4}),
    "snap_kv_shared": ("snap_kv", {"heads": "shared"}),
    "snap_kv_unpooled": ("snap_kv", {"pool": 1}),
    "snap_kv_grid": ("snap_kv", {"pool": 3, "grid_side": "model"}),
    "look_m_unmerged": ("look_m", {"merge": None}),
    "zip_vl_evicting": ("zip_vl", {"evicted": "drop"}),
}
"""Policies by other names, with options. "grid_side" is the model's; "allocate" replaces the policy's own."""

_BEFORE = {
    *("vl_cache", "snap_kv", "h2o", "look_m", "prefix_kv", "expected_attention", "key_norm", "key_difference"),
    *("streaming_llm", "random"),
}
"""Methods that also compress images before the question is known: those that need no question, and two that do."""

_YARDSTICKS = {"oracle": oracle, "oracle_by_mass": oracle_by_mass}

LABELS = {
    "full_cache": "Full cache",
    "vl_cache": "VL-Cache",
    "vl_cache_shared": "VL-Cache, one ranking per layer",
    "vl_cache_pooled": "VL-Cache, pooled over 5 tokens",
    "vl_cache_grid": "VL-Cache, pooled over 3 x 3 patches",
    "vl_cache_uniform": "VL-Cache, equal layers",
    "vl_cache_int8": "VL-Cache, 8 bits",
    "vl_cache_int4": "VL-Cache, 4 bits",
    "snap_kv": "SnapKV",
    "snap_kv_shared": "SnapKV, one ranking per layer",
    "snap_kv_unpooled": "SnapKV, not pooled",
    "snap_kv_grid": "SnapKV, pooled over 3 x 3 patches",
    "pyramid_kv": "PyramidKV",
    "h2o": "H2O",
    "tova": "TOVA",
    "streaming_llm": "StreamingLLM",
    "ada_kv": "Ada-KV",
    "zip_vl": "ZipVL, the rest at 2 bits",
    "zip_vl_evicting": "ZipVL, the rest evicted",
    "look_m": "LOOK-M",
    "look_m_unmerged": "LOOK-M, nothing merged",
    "prefix_kv": "PrefixKV",
    "air_cache": "AirCache",
    "mix_kv": "MixKV",
    "expected_attention": "Expected attention",
    "key_norm": "Key norm",
    "key_difference": "Key difference",
    "random": "Random",
    "oracle": "Oracle, equal layers",
    "oracle_by_mass": "Oracle, equal mass",
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the grid.

    Attributes:
      name: in results and on the command line.
      needs_answer: whether it must be shown the answer's attention (the oracles).
    """

    name: str
    needs_answer: bool = False

    @property
    def before(self) -> bool:
        """Whether it takes part when the question comes after compression."""
        return self.name in _BEFORE

    @property
    def label(self) -> str:
        """For tables and pictures."""
        return LABELS.get(self.name, self.name.replace("_", " "))

    def policy(self, budget: float, grid_side: int) -> Policy:
        """The policy at a budget, for a model whose images have `grid_side` patches along a side.

        Raises:
          PolicyError: the method does not know such a budget.
        """
        if self.name in _YARDSTICKS:
            return _YARDSTICKS[self.name](budget)
        name, options = _VARIANTS.get(self.name, (self.name, {}))
        options = {**options, "grid_side": grid_side} if "grid_side" in options else dict(options)
        allocate = options.pop("allocate", None)
        policy = policy_by_name(name, **options) if name == FULL else policy_by_name(name, budget=budget, **options)
        return policy if allocate is None else dataclasses.replace(policy, allocate=allocate)


def all_methods() -> list[Method]:
    """Every method but the full cache: policies in the order of `POLICIES`, each before its variants; yardsticks last.

    A policy that is added to `POLICIES` takes part without a line here.
    """
    names = []
    for name in POLICIES:
        if name not in (FULL, "random"):
            names += [name, *(variant for variant, (base, _) in _VARIANTS.items() if base == name)]
    return [*map(Method, names), Method("random"), *(Method(name, needs_answer=True) for name in _YARDSTICKS)]


def choose(kind: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """`wanted`, or all that are known where nothing is wanted.

    Raises:
      InputError: one of them is not known, or is named twice.
    """
    for name in wanted or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]!r}?" if near else ":"
            raise InputError(f"--{kind}: {name!r} does not exist{hint} Known: {', '.join(known)}")
        if list(wanted or ()).count(name) > 1:
            raise InputError(f"--{kind}: {name!r} is named twice: name it once")
    return list(wanted or known)
