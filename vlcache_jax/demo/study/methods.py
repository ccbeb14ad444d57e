"""The grid: every method that is known by name, variants of some of them, and the yardsticks."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from vlcache_jax.demo.study.oracle import oracle, oracle_by_mass
from vlcache_jax.demo.study.patterns import PATTERNS
from vlcache_jax.demo.study.prunings import PRUNINGS
from vlcache_jax.errors import InputError, PolicyError
from vlcache_jax.inference.recipe import Recipe, recipe_by_name
from vlcache_jax.policies import METHODS, Policy, policy_by_name
from vlcache_jax.policies.allocate.uniform import Uniform
from vlcache_jax.terminal.words import nearest

FULL = "full_cache"
BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 1.0)

_VARIANTS = {
    "vl_cache_shared": ("VL-Cache, one ranking per layer", "vl_cache,heads=shared"),
    "vl_cache_pooled": ("VL-Cache, pooled over 5 tokens", "vl_cache,pool=5,pooling=max"),
    "vl_cache_grid": ("VL-Cache, pooled over 3 x 3 patches", "vl_cache,pool=3,pooling=max,grid_side=SIDE"),
    "vl_cache_uniform": ("VL-Cache, equal layers", "vl_cache"),  # see `Method.policy`
    "vl_cache_int8": ("VL-Cache, 8 bits", "vl_cache,bits=8"),
    "vl_cache_int4": ("VL-Cache, 4 bits", "vl_cache,bits=4"),
    "snap_kv_shared": ("SnapKV, one ranking per layer", "snap_kv,heads=shared"),
    "snap_kv_unpooled": ("SnapKV, not pooled", "snap_kv,pool=1"),
    "snap_kv_grid": ("SnapKV, pooled over 3 x 3 patches", "snap_kv,pool=3,grid_side=SIDE"),
    "look_m_unmerged": ("LOOK-M, nothing merged", "look_m,merge=none"),
    "lag_kv_short": ("LagKV, blocks of 8 tokens", "lag_kv,lag=8"),
    "zip_vl_evicting": ("ZipVL, the rest evicted", "zip_vl,evicted=drop"),
}
"""Methods by other names: title, and policy as it is typed. SIDE is that of the model's images, in patches."""

_YARDSTICKS: dict[str, tuple[str, Callable[[float], Policy]]] = {
    "oracle": ("Oracle, equal layers", oracle),
    "oracle_by_mass": ("Oracle, equal mass", oracle_by_mass),
}

HEAD_SCORES = (
    (0.051, 0.000, 0.004, 0.000, 0.000, 0.000),
    (0.996, 0.996, 0.000, 0.008, 0.047, 0.012),
    (1.801, 2.246, 2.289, 0.465, 0.453, 0.594),
    (0.008, 0.000, 0.012, 0.016, 0.000, 0.000),
    (0.000, 0.000, 0.000, 0.000, 0.000, 0.000),
    (0.035, 0.008, 0.000, 0.023, 0.006, 0.000),
)
"""Of the shipped checkpoint's query heads, as `benchmarks/head_scores.py` measured them; SparseMM takes them."""

_ALSO_BEFORE = ("vl_cache", "snap_kv")


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the grid.

    Attributes:
      name: in results and on the command line: of a method, a variant or a yardstick, or a policy as it is typed,
        without its budget; or of a pruning method or a pattern; or a recipe as it is typed, with KEEP for the budget,
        of which a bare name of one of those two is what that name alone would be.
    """

    name: str

    @property
    def needs_answer(self) -> bool:
        """Whether it must be shown the answer's attention."""
        return self.name in _YARDSTICKS

    @property
    def before(self) -> bool:
        """Whether it takes part when the question comes after compression: if it needs none, and two that do."""
        return self.name in _ALSO_BEFORE or (self.name in METHODS and METHODS[self.name].query_agnostic)

    @property
    def label(self) -> str:
        """For tables and pictures."""
        if self.name in METHODS:
            return METHODS[self.name].title
        titles: dict[str, tuple[str, Any]] = {**_VARIANTS, **_YARDSTICKS, **PRUNINGS, **PATTERNS}
        return " + ".join(titles.get(part, (part.replace("_", " "), None))[0] for part in self.name.split(" + "))

    @property
    def replays(self) -> bool:
        """Whether it leaves what the prompt's layers compute as it is, so that a recording of them will do."""
        return self.name not in PRUNINGS and self.name not in PATTERNS and "+" not in self.name

    def recipe(self, budget: float, grid_side: int, tokens: int) -> Recipe:
        """The recipe at a budget.

        Args:
          budget: of a pruning method the part of the visual tokens that stays; of a pattern its density.
          grid_side: see `policy`.
          tokens: padded length of the prompts.

        Raises:
          PolicyError: see `policy`.
        """
        if self.replays:
            return Recipe(self.policy(budget, grid_side))
        own: list[tuple[str, Any]] = []
        typed = []
        for part in map(str.strip, self.name.replace("KEEP", f"{budget:g}").split("+")):
            if part in PRUNINGS:
                own.append(("pruning", PRUNINGS[part][1](budget)))
            elif part in PATTERNS:
                own.append(("prefill", PATTERNS[part][1](budget, tokens)))
            else:
                typed.append(part)
        others = recipe_by_name(" + ".join(typed)) if typed else Recipe()
        if len(dict(own)) < len(own) or any(getattr(others, kind) is not None for kind, _ in own):
            raise PolicyError(f"recipe {self.name!r} has two parts of a kind: give one of them")
        return dataclasses.replace(others, **dict(own))

    def policy(self, budget: float, grid_side: int) -> Policy:
        """The policy at a budget, for a model whose images have `grid_side` patches along a side.

        Raises:
          PolicyError: the method does not know such a budget, or there is no such method.
        """
        if self.needs_answer:
            return _YARDSTICKS[self.name][1](budget)
        typed = _VARIANTS[self.name][1] if self.name in _VARIANTS else self.name
        options: dict[str, Any] = {} if self.name == FULL else {"budget": budget}
        if self.name == "sparse_mm":
            options["scores"] = HEAD_SCORES
        policy = policy_by_name(typed.replace("SIDE", str(grid_side)), **options)
        return dataclasses.replace(policy, allocate=Uniform()) if self.name == "vl_cache_uniform" else policy


def all_methods() -> list[Method]:
    """Every method but the full cache, each before its variants; random and the yardsticks last."""
    names = []
    for name in METHODS:
        if name not in (FULL, "random"):
            names += [name, *(variant for variant, (_, typed) in _VARIANTS.items() if typed.split(",")[0] == name)]
    return [*map(Method, names), Method("random"), *map(Method, _YARDSTICKS)]


def choose_methods(wanted: Sequence[str] | None) -> list[Method]:
    """The methods of these names, or all.

    Raises:
      InputError: one of them is not known, or is named twice.
      PolicyError: it is a policy or recipe as it is typed, but not a right one.
    """
    known = [method.name for method in all_methods()]
    typed = [name for name in wanted or () if "," in name or "+" in name]
    for name in typed:
        Method(name).recipe(0.1, 16, 256)
    groups: dict[str, Sequence[str]] = {"prunings": tuple(PRUNINGS), "patterns": tuple(PATTERNS)}
    names = [x for name in wanted or () for x in groups.get(name, (name,))]
    known += [*PRUNINGS, *PATTERNS, *dict.fromkeys(typed)] if names else []
    return list(map(Method, choose("methods", names, known)))


def choose(kind: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """`wanted`, or all that are known where nothing is wanted.

    Raises:
      InputError: one of them is not known, or is named twice.
    """
    for name in wanted or ():
        if name not in known:
            raise InputError(f"--{kind}: {name!r} does not exist{nearest(name, known)}")
        if list(wanted or ()).count(name) > 1:
            raise InputError(f"--{kind}: {name!r} is named twice: name it once")
    return list(wanted or known)


def choose_budgets(wanted: list[float] | None) -> list[float]:
    """The budgets, ascending, or all. Raises InputError for those that are no fractions, or named twice."""
    budgets = sorted(wanted or BUDGETS)
    for budget in budgets:
        if not 1e-4 <= budget <= 1:
            raise InputError(f"--budgets: {budget:g} is out of range: give fractions in (0, 1], and not below 0.0001")
        if budgets.count(budget) > 1:
            raise InputError(f"--budgets: {budget:g} is named twice: name it once")
    return budgets
