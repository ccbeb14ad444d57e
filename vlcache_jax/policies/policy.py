"""A cache policy: which part of the prompt's KV cache is kept, composed of small parts."""

import dataclasses
from types import NoneType
from typing import Any, TypedDict

import jax.numpy as jnp

from vlcache_jax.cache.fractions import Count, as_fraction, floor_fraction
from vlcache_jax.errors import PolicyError, is_number, is_whole
from vlcache_jax.policies.allocate.equal_mass import RetainedMass
from vlcache_jax.policies.allocate.uniform import Allocate, Uniform
from vlcache_jax.policies.budget import Budget, Bytes, ByteShare, Mass, Tokens
from vlcache_jax.policies.decoding.append import APPEND, Append
from vlcache_jax.policies.decoding.rule import DecodingRule, rule_by_name
from vlcache_jax.policies.evicted.drop import Drop
from vlcache_jax.policies.evicted.quantise import Quantise
from vlcache_jax.policies.evicted.rule import Evicted
from vlcache_jax.policies.precision import check_bits
from vlcache_jax.policies.rows.spans import PostVision, Rows
from vlcache_jax.policies.scores.attention import AccumulatedAttention, Score
from vlcache_jax.policies.shares import SlotBudget, token_bytes
from vlcache_jax.policies.window import AverageShare, Recent, Window
from vlcache_jax.typing import ModelSpec

_WHOLE = 512  # tokens of a layer that are no matter of memory: shorter prompts are handed on whole


class StoreOptions(TypedDict, total=False):
    """What every method takes besides its own options, as keyword arguments; see `Policy`."""

    candidate_fraction: float | None
    bits: int | str | None


class Options(StoreOptions, total=False):
    """And what those take that do not settle it themselves.

    Example:
      vlc.SnapKV(256, bits=8, decoding=vlc.RollingWindow(64))
    """

    evicted: Evicted
    decoding: DecodingRule | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Frozen and hashable: a static argument of the compiled programs.

    After the prefill each layer has a score for every token and KV head; `allocate` gives the layer its slots; the last
    token, then the `sinks` first and the `recent` latest ones are kept whatever they score (`window.forced`), and
    the rest of the slots go to the best scores, ties to the lower position. Free of padding: it never scores, is never
    kept, never counts.

    Attributes:
      name: for reports.
      budget: what to keep of the prompt's cache. A fraction of it in [0.0001, 1]; `Tokens(n)`, or just the integer n
        from 2 on: n tokens a layer on average, everything if the prompt is shorter; `Bytes(n)`: n bytes of context for
        every prompt of the batch; `ByteShare(share)`: that share of the bytes of the prompt's cache in 16-bit numbers,
        whatever the `bits`; `Mass(share, cap)`: in every layer as little as holds that share of the scores, at
        most the fraction `cap` of the prompt's cache together. At 1 (or 1.0) nothing is scored and all is kept.
      rows: which prompt rows score the keys.
      score: from the rows' attention (or anything else in a layer) to a score.
      allocate: slots per layer, or per layer and KV head. A budget of mass decides the layers' slots by itself.
      recent: the window of most recent tokens: a fraction of a layer's slots, in [0, 1]; `Tokens(n)`; `Window(n)`, n
        tokens but not at the scores' expense; or `AverageShare(fraction)`, of the average layer's slots.
      sinks: how many of the prompt's first tokens are kept.
      protect: "text" or "vision": tokens of that kind rank before all others, within the same slots. None: one ranking.
      candidate_fraction: each layer of the prefill hands on only this fraction of its tokens, the best ones (but as
        many as the average layer gets), so that the full cache of all layers never exists at once. The result is the
        same unless a layer's slots exceed its candidates; then the layer keeps all candidates, and the report says
        `exact=False`. By default (None) as many as the most that layers get: where the method looks at the prompt to
        share the budget, all of it in the first two layers, then 4 times the average layer's slots; and 512 tokens at
        least (`candidates`). 1 is exact whatever a layer gets.
      bits: 8, 4 or 2 to store the kept keys and values as integers of so many bits (`kernels.quantisation`), "float8",
        or another precision's word (`kernels.precision`); None for the model's dtype. It changes nothing about which
        tokens are kept. The new tokens' cache is never quantised.
      evicted: what becomes of the other tokens: `Drop()`, `Merge(kind)` into the kept ones, or `Quantise(bits)` to keep
        them all at fewer bits.
      lanes: groups into which the KV heads of a layer fall, if `allocate` gives heads different numbers of slots: the
        heads of a group share a lane of the store, so the sum over them is what is fixed. Must divide the KV heads;
        on a mesh that splits heads a multiple of the axis' size splits the store, too, and 1 replicates it.
      decoding: what becomes of the generated tokens: `Append` (none is ever evicted), `RollingWindow`, `Evict` or
        `Recompress`; or the name of such a rule, "window:256" or "recompress:128". Under a budget of 1, which leaves
        nothing to evict, the last two are `Append`.

    Raises:
      PolicyError: a value out of range, or a combination that cannot work.
    """

    name: str
    budget: Budget
    rows: Rows = dataclasses.field(default_factory=PostVision)
    score: Score = dataclasses.field(default_factory=AccumulatedAttention)
    allocate: Allocate = dataclasses.field(default_factory=Uniform)
    recent: Recent = 0.1
    sinks: int = 0
    protect: str | None = None
    evicted: Evicted = dataclasses.field(default_factory=Drop)
    candidate_fraction: float | None = None
    bits: int | str | None = None
    lanes: int = 1
    decoding: DecodingRule | str = dataclasses.field(default_factory=Append)

    def __post_init__(self) -> None:
        if isinstance(self.budget, int) and not isinstance(self.budget, bool) and self.budget > 1:
            object.__setattr__(self, "budget", Tokens(self.budget))
        for name, low, kinds, others in (
            (
                "budget",
                1e-4,
                Tokens | Bytes | ByteShare | Mass,
                ", or tokens a layer as an integer from 2 on, or Bytes(n), ByteShare(share), or Mass(share, cap)",
            ),
            ("recent", 0.0, Tokens | Window | AverageShare, ", or Tokens(n), or Window(n)"),
            ("candidate_fraction", 1e-4, NoneType, ""),
        ):
            value = getattr(self, name)
            if isinstance(value, kinds):
                continue
            if not is_number(value, low, 1):
                span = f"[{low:g}, 1]" if low == 0 else "(0, 1], and not below 0.0001"
                raise PolicyError(f"{name}={value!r} is out of range: give a fraction in {span}{others}")
        if not is_whole(self.sinks, 0):
            raise PolicyError(f"sinks={self.sinks!r} is out of range: give a number of tokens, 0 or more")
        if not is_whole(self.lanes, 1):
            raise PolicyError(f"lanes={self.lanes!r} is out of range: give a number that divides the model's KV heads")
        if self.protect not in (None, "text", "vision"):
            raise PolicyError(f"protect={self.protect!r} is not known: use 'text', 'vision' or None")
        if self.bits is not None:
            check_bits("bits", self.bits)
        if not isinstance(self.evicted, Evicted):
            raise PolicyError(f"evicted={self.evicted!r} is not known: use Drop(), Merge(kind) or Quantise(bits)")
        object.__setattr__(self, "decoding", rule_by_name(self.decoding))
        self._check_combination()
        self._check_evicted()
        if not (self.keeps_all and rule_by_name(self.decoding).evicts):
            rule_by_name(self.decoding).check(self)

    def _check_combination(self) -> None:
        budget = self.budget
        if isinstance(budget, Tokens):
            window = max(1, self.recent.count if isinstance(self.recent, Tokens) else 1)
            if self.sinks + window > budget.count:
                raise PolicyError(
                    f"{self.name}: sinks={self.sinks} and a window of {window} recent tokens do not fit into "
                    f"budget={budget.count} tokens a layer: raise the budget, or lower sinks or recent"
                )
        elif not isinstance(budget, Bytes | ByteShare):
            most = (budget.cap or 1.0) if isinstance(budget, Mass) else budget
            if self.candidate_fraction and as_fraction(self.candidate_fraction) < as_fraction(most) < 1:
                raise PolicyError(
                    f"candidate_fraction={self.candidate_fraction} is below budget={budget}: the layers together could "
                    "not hand on enough tokens; raise candidate_fraction (2 to 4 times the budget is a good start)"
                )
        if isinstance(budget, Mass) and not self.score.is_mass:
            raise PolicyError(
                f"{self.name}: a budget of {budget} needs scores that are attention, not negative, and "
                f"{type(self.score).__name__} is not (`Score.is_mass`): give a fraction, tokens or bytes"
            )
        self.sharing.check(budget)

    @property
    def sharing(self) -> Allocate:
        """The rule in force: `allocate`; with a budget of mass, what is left of it when that decides the layers."""
        if not isinstance(self.budget, Mass):
            return self.allocate
        return self.allocate.with_layers(RetainedMass(self.recent, self.sinks, self.protect))

    def _check_evicted(self) -> None:
        if self.evicted.saves and self.candidate_fraction and as_fraction(self.candidate_fraction) < 1:
            raise PolicyError(
                f"{self.name}: with candidate_fraction={self.candidate_fraction} a layer loses tokens before "
                f"evicted={self.evicted} could save them: leave that out, or use Drop() (LookM: merge=None)"
            )
        self.evicted.check(self)

    def candidates(self, length: Count, budget: SlotBudget) -> Count:
        """How many tokens a layer hands on of a prompt of `length` tokens; int in, int out.

        It depends on the prompt's own length alone, and never falls with it: so what a row keeps does not depend on
        its padding, and the number for the padded length has room for that of every row.

        Example:
          >>> policy = Policy(name="mine", budget=0.1, candidate_fraction=0.3)
          >>> policy.candidates(1000, SlotBudget(layers=4, fraction=0.1))
          300
        """
        if self.evicted.saves:
            return length
        count: Any = self.sharing.most(length, budget)
        least: Any = _WHOLE
        if self.candidate_fraction is not None:
            count, least = floor_fraction(length, self.candidate_fraction), budget.total(length) // budget.layers
        if isinstance(count, int):
            return min(length, max(least, count))  # type: ignore[return-value]
        return jnp.minimum(length, jnp.maximum(least, count))  # type: ignore[return-value]

    @property
    def whole_layers(self) -> int:
        """How many of the first layers hand on all they have; see `Allocate.whole_layers`."""
        return self.sharing.whole_layers if self.candidate_fraction is None else 0

    @property
    def keeps_all(self) -> bool:
        """Whether this is the uncompressed cache."""
        return self.budget == 1

    def settled(self, spec: ModelSpec) -> "Policy":
        """This policy for a model: bits that its budget leaves open are chosen; see `ByteShare`."""
        budget = self.budget
        if not isinstance(budget, ByteShare) or not budget.tiers:
            return self
        room = budget.share * token_bytes(spec.head_dim, None)
        first, others = next((a, b) for a, b in budget.tiers if b is None or token_bytes(spec.head_dim, b) < room)
        evicted = Drop() if others is None else Quantise(others)
        return dataclasses.replace(self, budget=ByteShare(budget.share), bits=self.bits or first, evicted=evicted)

    @property
    def repeats(self) -> bool:
        """Whether prefill has every prompt said twice, for rows that are those of its repetition (`Repetition`)."""
        return getattr(self.rows, "repeats", False) and not self.keeps_all

    @property
    def shared_lanes(self) -> int | None:
        """`lanes`, where the KV heads of a group share one; None where each has its own."""
        return self.lanes if self.sharing.per_head and not self.keeps_all else None

    @property
    def rule(self) -> DecodingRule:
        """`decoding` as it is carried out, with everything filled in that it takes from the policy."""
        rule = rule_by_name(self.decoding)
        return APPEND if self.keeps_all and rule.evicts else rule.of(self)
