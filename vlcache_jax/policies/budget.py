"""What to keep of a prompt, in the user's words."""

import dataclasses

from vlcache_jax.errors import PolicyError, is_number, is_whole
from vlcache_jax.files.exporting import static_field


@static_field
@dataclasses.dataclass(frozen=True)
class Tokens:
    """A number of prompt tokens: as a budget, of one layer on average; as `Policy.recent`, of the window.

    Example:
      >>> Tokens(256)
      Tokens(count=256)
    """

    count: int

    def __post_init__(self) -> None:
        if not is_whole(self.count, 0):
            raise PolicyError(f"Tokens({self.count!r}): give a whole number of tokens")

    def __format__(self, _: str) -> str:
        return f"{self.count} tokens"


@static_field
@dataclasses.dataclass(frozen=True)
class Bytes:
    """A budget in bytes: of the buffers of one prompt's compressed context, alignment and positions included.

    It is a promise for every prompt of a batch, not for the batch, so that a prompt keeps what it keeps alone. The
    tail of generated tokens is not counted. A prompt that needs less keeps everything.

    Example:
      >>> Bytes(2**28)
      Bytes(count=268435456)
    """

    count: int

    def __post_init__(self) -> None:
        if not is_whole(self.count, 1):
            raise PolicyError(f"Bytes({self.count!r}): give a whole number of bytes, at least 1")

    def __format__(self, _: str) -> str:
        return f"{self.count} bytes"


@static_field
@dataclasses.dataclass(frozen=True)
class Mass:
    """A budget in retained attention: every prompt keeps as little as holds a share of the scores, below a cap.

    Each layer keeps the fewest tokens, the forced ones among them, that hold at least `share` of the layer's scores
    (the mean over its KV heads). All layers together keep at most `cap` of the prompt's cache; where that is not
    enough, all layers hold the largest common share that fits. The memory is that of the cap: the size of the store
    must be known before the prompt is seen. A small share keeps less and decodes faster, but frees no more.

    The budget decides the layers' slots itself: a method's own allocation over layers takes no part.

    Attributes:
      share: of a layer's scores, between 0 and 1.
      cap: fraction of the prompt's cache, in (0, 1].

    Raises:
      PolicyError: a share or cap out of range, or no cap.

    Example:
      >>> Mass(0.98, cap=0.4)
      Mass(share=0.98, cap=0.4)
    """

    share: float
    cap: float | None = None

    def __post_init__(self) -> None:
        share, cap = self.share, self.cap
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise PolicyError(
                f"Mass({share!r}): give the share of the attention to keep, above 0 and below 1 (budget=1.0 keeps all)"
            )
        if cap is None:
            raise PolicyError(
                f"Mass({share!r}) has no cap: the size of the store must be known before the prompt is seen, so give "
                f"the most that may be kept as a fraction of the prompt, for example Mass({share!r}, cap=0.4)"
            )
        if not is_number(cap, 1e-4, 1):
            raise PolicyError(f"Mass({share!r}, cap={cap!r}): give a cap in (0, 1], and not below 0.0001")

    def __format__(self, _: str) -> str:
        return budget_text(self)


@static_field
@dataclasses.dataclass(frozen=True)
class ByteShare:
    """A budget in bytes that scales with the prompt: a share of what its whole cache takes in 16-bit numbers.

    What a token takes follows from the policy's `bits` and from those of `evicted`, scales included, so that fewer bits
    buy more tokens. With s bytes a kept token, o another one (0 if it is dropped) and f in 16 bits, the policy keeps
    the fraction (share f - o) / (s - o) of the tokens, rounded down to a ten-thousandth. A float number counts two
    bytes, whatever the model computes in; positions and the alignment of segments are not counted, as they are not in
    f.

    Attributes:
      share: in (0, 1).
      tiers: which bits the policy may choose from, when it meets a model: pairs of bits, of the tokens that are kept
        and of the others (None: dropped). It takes the first pair whose share holds all tokens at the others' bits.
        Empty: those of the policy.

    Raises:
      PolicyError: a share out of range.

    Example:
      >>> ByteShare(0.25).share
      0.25
    """

    share: float
    tiers: tuple[tuple[int | str, int | str | None], ...] = ()

    def __post_init__(self) -> None:
        share = self.share
        object.__setattr__(self, "tiers", tuple(map(tuple, self.tiers)))  # which files hold as lists
        if isinstance(share, bool) or not isinstance(share, int | float) or not 1e-4 <= share < 1:
            raise PolicyError(f"ByteShare({share!r}): give a share of the bytes of a 16-bit cache, below 1")

    def __format__(self, _: str) -> str:
        return budget_text(self)


Budget = float | Tokens | Bytes | ByteShare | Mass

DEFAULT_BUDGET = 0.1
"""Of every method whose authors do not say otherwise."""


def budget_text(budget: Budget) -> str:
    """A budget in words.

    Example:
      >>> budget_text(0.1), budget_text(Tokens(64)), budget_text(Bytes(1000000))
      ('10 %', '64 tokens a layer', '1000000 bytes a prompt')
      >>> budget_text(Mass(0.98, cap=0.4))
      '98 % of the attention, at most 40 %'
    """
    if isinstance(budget, Tokens):
        return f"{budget.count} tokens a layer"
    if isinstance(budget, Bytes):
        return f"{budget.count} bytes a prompt"
    if isinstance(budget, ByteShare):
        return f"{100 * budget.share:.4g} % of the bytes"
    if isinstance(budget, Mass):
        return f"{100 * budget.share:.4g} % of the attention, at most {budget_text(budget.cap or 1.0)}"
    return f"{100 * budget:.4g} %"


def budget_value(budget: Budget) -> float | str:
    """A budget for JSON: a fraction as a number, any other in words."""
    return budget if isinstance(budget, float) else budget_text(budget)


def policy_text(name: str, budget: Budget) -> str:
    """A policy in words: its name, and its budget unless all is kept.

    Example:
      >>> policy_text("vl_cache", 0.1), policy_text("full_cache", 1.0)
      ('vl_cache 10 %', 'full_cache')
    """
    return name if budget == 1 else f"{name} {budget_text(budget)}"
