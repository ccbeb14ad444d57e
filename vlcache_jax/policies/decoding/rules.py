"""What becomes of the generated tokens: kept, kept for a while, or weighed against the prompt for the same slots."""

import dataclasses
from typing import TYPE_CHECKING, Any

from vlcache_jax.errors import PolicyError
from vlcache_jax.files.exporting import static_field
from vlcache_jax.policies.allocate.uniform import Uniform
from vlcache_jax.policies.budget import Bytes, Tokens
from vlcache_jax.policies.evicted.rules import Drop, Quantise
from vlcache_jax.policies.window import AverageShare, Recent, Window

if TYPE_CHECKING:
    from vlcache_jax.policies.policy import Policy


@dataclasses.dataclass(frozen=True)
class Generated:
    """A rule, one of the four below. Frozen and hashable: it is static in the state's `TailStore.rule`.

    Attributes:
      unlimited: whether an answer may be longer than the tail has room for.
      rewrites_context: whether decoding changes what was kept of the prompt.
    """

    @property
    def unlimited(self) -> bool:
        """See the class."""
        return True

    @property
    def rewrites_context(self) -> bool:
        """See the class."""
        return False

    def tail_tokens(self, max_new_tokens: int) -> int:
        """Tokens of a layer that the tail must hold."""
        raise NotImplementedError

    def check(self, policy: "Policy") -> None:
        """Raises PolicyError if it cannot go with the rest of a policy; called when the policy is made."""

    def of(self, policy: "Policy") -> "Generated":
        """The rule with everything filled in that it takes from its policy."""
        return self


@static_field
@dataclasses.dataclass(frozen=True)
class Append(Generated):
    """All of them, at full precision, never evicted: the tail has room for `max_new_tokens`."""

    @property
    def unlimited(self) -> bool:
        """See `Generated`."""
        return False

    def tail_tokens(self, max_new_tokens: int) -> int:
        """See `Generated.tail_tokens`."""
        return max_new_tokens


APPEND = Append()


@static_field
@dataclasses.dataclass(frozen=True)
class RollingWindow(Generated):
    """The latest `tokens` of them, in a ring; what was kept of the prompt stays.

    A step costs what it costs with `Append`. After StreamingLLM (arXiv 2309.17453), whose sinks are the context's
    matter: a step's own token and the `tokens - 1` before it are seen, at the positions they have.

    Raises:
      PolicyError: tokens below 1.
    """

    tokens: int = 256

    def __post_init__(self) -> None:
        _check_count("RollingWindow", "tokens", self.tokens)

    def tail_tokens(self, max_new_tokens: int) -> int:
        """See `Generated.tail_tokens`."""
        return self.tokens


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class Evict(Generated):
    """Prompt and generated tokens share one cache of C slots per layer and KV head; the weakest makes room.

    C is the layer's share of the budget: for a fraction, of the row's own prompt; for `Tokens`, that many, and a
    shorter prompt leaves slots free. A step appends its token, attends to all tokens held, C and its own, weighs
    them, and then C stay: the latest ones, the sinks, and the best weights; what is gone is gone.

    Attributes:
      weigh: "sum": attention from all rows so far, the prompt's included (H2O); "last": from the latest row (TOVA).
      heads: "each" averages a weight over the query heads of a KV head; "shared" over all of the layer, so that all
        KV heads hold the same tokens.
      recent: the window of latest tokens, as in `Policy`, of C slots; None for the policy's. At least the newest.
      sinks: the prompt's first tokens; None for the policy's.

    Raises:
      PolicyError: a value that is not known; as a policy's rule also: an allocation that is not `Uniform`, a budget in
        bytes, a quantised store, evicted tokens that are not dropped, a protected kind, a score that is not attention
        ("sum"), or not one for all heads ("shared").
    """

    weigh: str = "sum"
    heads: str = "each"
    recent: Recent | None = None
    sinks: int | None = None

    def __post_init__(self) -> None:
        if self.weigh not in ("sum", "last"):
            raise PolicyError(f"Evict(weigh={self.weigh!r}) is not known: use 'sum' or 'last'")
        if self.heads not in ("each", "shared"):
            raise PolicyError(f"Evict(heads={self.heads!r}) is not known: use 'each' or 'shared'")
        _check_window("Evict", self.recent, self.sinks)

    @property
    def rewrites_context(self) -> bool:
        """See `Generated`."""
        return True

    def tail_tokens(self, max_new_tokens: int) -> int:
        """See `Generated.tail_tokens`."""
        return 0

    def check(self, policy: "Policy") -> None:
        """See `Generated.check`."""
        name = f"{policy.name}: Evict"
        if type(policy.allocate) is not Uniform:
            raise PolicyError(
                f"{name} needs the same number of slots in every layer and head, but allocate={policy.allocate}: use "
                "Uniform(), or Recompress(), which works with every allocation"
            )
        if policy.bits is not None or not isinstance(policy.evicted, Drop):
            raise PolicyError(
                f"{name} rewrites single slots, but bits={policy.bits} and evicted={policy.evicted}: use bits=None and "
                "evicted=Drop()"
            )
        if isinstance(policy.budget, Bytes):
            raise PolicyError(f"{name} cannot count budget={policy.budget}: give a fraction, or tokens a layer")
        if policy.protect is not None:
            raise PolicyError(f"{name} weighs by attention alone, but protect={policy.protect!r}: use protect=None")
        if self.weigh == "sum" and not policy.score.needs_attention:
            raise PolicyError(f"{name}(weigh='sum') starts from attention, but score={policy.score}: use weigh='last'")
        if getattr(policy.score, "normalised", False):
            raise PolicyError(f"{name} adds up attention, but the score is normalised: use normalised=False")
        if self.heads == "shared" and getattr(policy.score, "heads", None) != "shared":
            raise PolicyError(
                f"{name}(heads='shared') needs one ranking of the prompt for all heads, but score={policy.score}: use "
                "AccumulatedAttention('shared')"
            )
        _check_fits(name, self.of(policy), policy)

    def of(self, policy: "Policy") -> "Evict":
        """See `Generated.of`."""
        return _with_window(self, policy)


@static_field
@dataclasses.dataclass(frozen=True)
class Recompress(Generated):
    """Every `every` generated tokens, they and what was kept before compete again for the context's slots.

    After ZipCache, which compresses every 100 tokens. Between two compressions the tail holds the new tokens. Then, in
    each layer and KV head, as many tokens stay as were kept of the prompt: the latest ones, the sinks, and the best by

        score_j = sum over the last `rows` generated tokens q of A[q, j], averaged over the query heads of a KV head

    whatever scored the prompt; `Policy.protect` no longer counts. Steps in between cost nothing more: they note their
    queries and the log-sum-exp of their logits, and the scores are worked out from those when they are needed.

    Attributes:
      every: tokens between two compressions, and the tail's room.
      rows: generated tokens that score, at most `every`. None: min(every, 32).
      recent: as in `Policy`; None for the policy's.
      sinks: as in `Policy`; None for the policy's.

    Raises:
      PolicyError: a number out of range.
    """

    every: int = 128
    rows: int | None = None
    recent: Recent | None = None
    sinks: int | None = None

    def __post_init__(self) -> None:
        _check_count("Recompress", "every", self.every)
        _check_count("Recompress", "rows", self.scoring_rows)
        if self.scoring_rows > self.every:
            raise PolicyError(f"Recompress(every={self.every}, rows={self.rows}): at most {self.every} rows can score")
        _check_window("Recompress", self.recent, self.sinks)

    @property
    def scoring_rows(self) -> int:
        """`rows`, filled in."""
        return min(self.every, 32) if self.rows is None else self.rows

    @property
    def rewrites_context(self) -> bool:
        """See `Generated`."""
        return True

    def tail_tokens(self, max_new_tokens: int) -> int:
        """See `Generated.tail_tokens`."""
        return self.every

    def check(self, policy: "Policy") -> None:
        """See `Generated.check`."""
        if policy.bits is not None or isinstance(policy.evicted, Quantise):
            raise PolicyError(
                f"{policy.name}: Recompress rewrites slots, but bits={policy.bits} and evicted={policy.evicted}: "
                "use bits=None and Drop() or Merge(), or Append() or RollingWindow() as generated"
            )
        _check_fits(f"{policy.name}: Recompress", self.of(policy), policy)

    def of(self, policy: "Policy") -> "Recompress":
        """See `Generated.of`."""
        return _with_window(self, policy)


def as_generated(decoding: "str | Generated", evict: Evict | None = None) -> Generated:
    """The rule that a policy's option `decoding` means.

    Args:
      decoding: "append", "window" or "window:256", "recompress" or "recompress:128", "evict" where the method has such
        a rule; or a rule.
      evict: what "evict" means for the method.

    Raises:
      PolicyError: anything else.

    Example:
      >>> as_generated("window:64")
      RollingWindow(tokens=64)
    """
    if isinstance(decoding, Generated):
        return decoding
    kind, colon, count = str(decoding).partition(":")
    if count.isdecimal() or not colon:
        numbers = (int(count),) if colon else ()
        if kind == "window":
            return RollingWindow(*numbers)
        if kind == "recompress":
            return Recompress(*numbers)
        if kind == "append" and not colon:
            return Append()
        if kind == "evict" and not colon and evict is not None:
            return evict
    known = "append, window:TOKENS, recompress:TOKENS" + (", evict" if evict is not None else "")
    hint = "" if evict is not None or kind != "evict" else " ('evict' is a part of h2o, tova and streaming_llm)"
    raise PolicyError(f"decoding={decoding!r} is not known: use one of {known}{hint}")


def _with_window(rule: Any, policy: "Policy") -> Any:
    recent = policy.recent if rule.recent is None else rule.recent
    return dataclasses.replace(rule, recent=recent, sinks=policy.sinks if rule.sinks is None else rule.sinks)


def _check_count(rule: str, field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PolicyError(f"{rule}({field}={value!r}) is out of range: give a number of tokens, at least 1")


def _check_window(rule: str, recent: Any, sinks: Any) -> None:
    fraction = isinstance(recent, int | float) and not isinstance(recent, bool) and 0 <= recent <= 1
    if recent is not None and not fraction and not isinstance(recent, Tokens | Window | AverageShare):
        raise PolicyError(
            f"{rule}(recent={recent!r}) is out of range: give a fraction in [0, 1], or Tokens(n), or Window(n)"
        )
    if sinks is not None and (isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0):
        raise PolicyError(f"{rule}(sinks={sinks!r}) is out of range: give a number of tokens, 0 or more")


def _check_fits(name: str, rule: Any, policy: "Policy") -> None:
    if isinstance(policy.budget, Tokens):
        window = rule.recent.count if isinstance(rule.recent, Tokens) else 1
        if rule.sinks + window > policy.budget.count:
            raise PolicyError(
                f"{name}: sinks={rule.sinks} and a window of {window} recent tokens do not fit into "
                f"budget={policy.budget.count} tokens a layer: raise the budget, or lower sinks or recent"
            )
