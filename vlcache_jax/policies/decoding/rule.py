"""What becomes of generated tokens: what a rule says and does, and the names by which rules are known.

check, of           when a policy is made
check_windows       when a model has layers with a window
layer_rooms         where the context must leave room for generated tokens
note, remember      at the end of prefill: what the rule wants to know of the prompt's attention
tail_tokens         when an answer starts
make_room, attend   in every step
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeVar

import jax

from vlcache_jax.cache.state import KVState
from vlcache_jax.cache.store import PackedStore
from vlcache_jax.errors import PolicyError, is_number, is_whole
from vlcache_jax.files.exporting import static_field
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.policies.budget import Tokens
from vlcache_jax.policies.parts import Parts
from vlcache_jax.policies.scores.attention import LayerInputs
from vlcache_jax.policies.shares import SlotBudget
from vlcache_jax.policies.window import AverageShare, Recent, Window
from vlcache_jax.typing import ModelSpec


class Step(NamedTuple):
    """How a step attends.

    Attributes:
      attend: (query, key, value, carry, layer) -> (out, carry, None), called by every layer.
      carry: the first layer's.
      close: from the last layer's carry to the new state.
    """

    attend: Callable[..., Any]
    carry: Any
    close: Callable[[Any], KVState]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is known at the end of prefill.

    Attributes:
      scores: f32 [layers, batch, heads or 1, entries], of the candidates; None where all is kept.
      order: i32 [layers, batch, heads or 1, entries], from `selection.select_layers`; None where all is kept.
      requested: i32 [batch, layers] or [batch, layers, kv_heads], slots that the allocator gave.
      context: the packed store.
      rooms: slots of each layer in it, from `DecodingRule.layer_rooms`.
      windows: of each layer, from `ModelSpec.layer_windows`.
      noted: what `DecodingRule.note` returned, stacked over layers.
    """

    scores: jax.Array | None
    order: jax.Array | None
    requested: jax.Array
    context: PackedStore
    rooms: tuple[int, ...] | None
    windows: tuple[int | None, ...]
    noted: Any


@dataclasses.dataclass(frozen=True)
class DecodingRule:
    """A rule: its configuration and its functions. Frozen and hashable, as it is static in `KVState.decoding`.

    Subclasses define `tail_tokens` and `attend` at least; `append.appending` attends with a tail.

    Attributes:
      unlimited: whether an answer may be longer than the tail has room for.
      rewrites_context: whether an answer needs the context as its own: decoding changes it, or reads it slot by slot.
      whole_prompts: whether it wants all tokens of a prompt in every layer, so that it cannot go with pruning.
      contrast: what part of the logits of the last token's embedding alone is taken from the model's (`VASparse`).
    """

    unlimited = True
    rewrites_context = False
    whole_prompts = False
    contrast = 0.0

    @property
    def evicts(self) -> bool:
        """Whether it gives up tokens of the prompt. Under a budget of 1 such a rule is `Append`."""
        return self.rewrites_context

    @property
    def forced(self) -> tuple[Recent, int] | None:
        """The window of latest tokens and the sinks that it keeps of what it weighs; None if it weighs nothing."""
        return None

    def check(self, policy: Parts) -> None:
        """Raises PolicyError if it cannot go with the rest of a policy; called when the policy is made."""

    def check_windows(self, largest: int) -> None:
        """Raises PolicyError if its steps cannot move on the windows of a model's layers, the largest of `largest`.

        A layer with a window sees its latest tokens, whatever the rule does in the others.
        """
        raise PolicyError(
            f"{type(self).__name__} does not know how to move the windows on that some layers of this model have: use "
            "decoding=vlc.Append()"
        )

    def of(self, policy: Parts) -> Self:
        """The rule with everything filled in that it takes from its policy."""
        return self

    def layer_rooms(
        self, policy: Parts, budget: SlotBudget, windows: tuple[int | None, ...], length: int
    ) -> tuple[int, ...] | None:
        """Slots of each layer in the context, for prompts of up to `length` tokens; None packs what is kept.

        `windows` are those of the layers, as in `Prompt`.
        """
        return None

    def note(self, inputs: LayerInputs) -> Any:
        """What it needs of a layer of the prefill, a pytree of arrays."""
        return None

    def remember(self, policy: Parts, prompt: Prompt) -> Any:
        """`KVState.observed` of answers to a prompt: a pytree of arrays with the batch as their first axis.

        Where their heads lie on a mesh its class says, as `PackedStore.partition_specs` does.
        """
        return None

    def tail_tokens(self, max_new_tokens: int) -> int:
        """Tokens of a layer that the tail must hold."""
        raise NotImplementedError

    def make_room(self, state: KVState, spec: ModelSpec) -> KVState:
        """Called before every step."""
        return state

    def attend(self, state: KVState, kernels: Kernels, spec: ModelSpec) -> Step:
        """A step that appends a token to every row. It leaves `tail.length` as it is, which is counted for it."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _Name:
    rule: type[Any]
    count: str
    methods: str


RULES: dict[str, _Name] = {}
"""Rules by name; `named` adds to it."""

Rule = TypeVar("Rule", bound=type[DecodingRule])


def named(name: str, count: str = "", methods: str = "") -> Callable[[Rule], Rule]:
    """A class decorator that makes a rule known by name: to policies, the command line and exported programs.

    Args:
      name: such as "window".
      count: what a number after a colon counts, where the rule takes one as its first argument: "window:256".
      methods: the methods that have such a rule, where each has its own.
    """

    def register(rule: Rule) -> Rule:
        RULES[name] = _Name(rule, count, methods)
        static_field(rule)
        return rule

    return register


def rule_by_name(decoding: str | DecodingRule, **own: DecodingRule) -> DecodingRule:
    """The rule that a policy's option `decoding` means.

    Args:
      decoding: "append", "window" or "window:256", "recompress" or "recompress:128", "evict" where the method has such
        a rule; or a rule.
      **own: what the names of rules that methods have of their own mean for this one.

    Raises:
      PolicyError: anything else.

    Example:
      >>> rule_by_name("window:64")
      RollingWindow(tokens=64)
    """
    if isinstance(decoding, DecodingRule):
        return decoding
    word, colon, count = str(decoding).partition(":")
    found = RULES.get(word)
    if found is not None and (count.isdecimal() and found.count if colon else True):
        if not found.methods:
            return found.rule(*((int(count),) if colon else ()))
        if word in own:
            return own[word]
    names = {name: f"{name}:{x.count}" if x.count else name for name, x in RULES.items()}
    known = ", ".join([text for name, text in names.items() if not RULES[name].methods] + list(own))
    hint = f" ({word!r} is a part of {found.methods})" if found is not None and found.methods and not own else ""
    raise PolicyError(f"decoding={decoding!r} is not known: use one of {known}{hint}")


def check_ring(rule: str, field: str, value: int, largest: int) -> None:
    """Raises PolicyError unless a tail of `value` slots, the step's own included, holds a window of `largest`."""
    if value < largest:
        raise PolicyError(
            f"{rule}({field}={value}) holds fewer generated tokens than the {largest} that layers of this model with a "
            f"window see: give {field}={largest} or more, or use decoding=vlc.Append()"
        )


def check_count(rule: str, field: str, value: Any) -> None:
    """Raises PolicyError unless a rule's field is a number of tokens."""
    if not is_whole(value, 1):
        raise PolicyError(f"{rule}({field}={value!r}) is out of range: give a number of tokens, at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeighingRule(DecodingRule):
    """A rule that keeps a window and sinks of what it weighs, and rewrites the context.

    Attributes:
      recent: the window of latest tokens, as in `Policy`; None for the policy's.
      sinks: the prompt's first tokens; None for the policy's.
    """

    recent: Recent | None = None
    sinks: int | None = None
    rewrites_context = True

    def __post_init__(self) -> None:
        rule, recent, sinks = type(self).__name__, self.recent, self.sinks
        fraction = is_number(recent, 0, 1)
        if recent is not None and not fraction and not isinstance(recent, Tokens | Window | AverageShare):
            raise PolicyError(
                f"{rule}(recent={recent!r}) is out of range: give a fraction in [0, 1], or Tokens(n), or Window(n)"
            )
        if sinks is not None and not is_whole(sinks, 0):
            raise PolicyError(f"{rule}(sinks={sinks!r}) is out of range: give a number of tokens, 0 or more")

    @property
    def forced(self) -> tuple[Recent, int]:
        """See `DecodingRule`; of a rule with everything filled in."""
        assert self.recent is not None
        assert self.sinks is not None
        return self.recent, self.sinks

    def of(self, policy: Parts) -> Self:
        recent = policy.recent if self.recent is None else self.recent
        return dataclasses.replace(self, recent=recent, sinks=policy.sinks if self.sinks is None else self.sinks)

    def check(self, policy: Parts) -> None:
        recent, sinks = self.of(policy).forced
        if isinstance(policy.budget, Tokens):
            window = recent.count if isinstance(recent, Tokens) else 1
            if sinks + window > policy.budget.count:
                raise PolicyError(
                    f"{policy.name}: {type(self).__name__}: sinks={sinks} and a window of {window} recent tokens do "
                    f"not fit into budget={policy.budget.count} tokens a layer: raise the budget, or lower sinks or "
                    "recent"
                )
