"""What the functions that make policies have in common: an option they do not take is refused by name."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, get_args

from vlcache_jax.errors import PolicyError
from vlcache_jax.policies.policy import Policy

Arguments = ParamSpec("Arguments")


def method(function: Callable[Arguments, Policy]) -> Callable[Arguments, Policy]:
    """Decorates a method's function: an option that it does not have, or settles itself, is a PolicyError.

    Example:
      >>> @method
      ... def Latest(budget: float = 0.1) -> Policy:
      ...     return Policy(name="latest", budget=budget, recent=1.0)
      >>> Latest(recent=0.5)
      Traceback (most recent call last):
      vlcache_jax.errors.PolicyError: Latest settles recent itself: use dataclasses.replace(Latest(...), recent=0.5)
    """
    known = options_of(function)

    @functools.wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Policy:
        for option, value in kwargs.items():
            if option not in known:
                raise PolicyError(_refusal(function.__name__, option, value, known))
        return function(*args, **kwargs)

    return checked


def options_of(function: Callable[..., Policy]) -> list[str]:
    """The names of all options of a method, those of `StoreOptions` or `Options` included."""
    parameters = inspect.signature(function).parameters
    known = [name for name in parameters if name != "options"]
    if "options" in parameters:
        known += get_args(parameters["options"].annotation)[0].__annotations__
    return known


def nearest(word: str, known: list[str]) -> str:
    """The end of a message about a word that is not known."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    did_you_mean = f": did you mean {close[0]!r}?" if close else ":"
    return f"{did_you_mean} Known: {', '.join(known)}"


def _refusal(name: str, option: str, value: Any, known: list[str]) -> str:
    instead = {"generated": "decoding", "evicted": "merge"}.get(option, "")
    if instead in known:
        also = ", which takes a rule, too" if instead == "decoding" else ""
        return f"{name}({option}={value!r}): the option is called {instead} here{also}"
    if option not in ("name", "budget") and option in (field.name for field in dataclasses.fields(Policy)):
        return f"{name} settles {option} itself: use dataclasses.replace({name}(...), {option}={value!r})"
    return f"{name} has no option {option!r}{nearest(option, known)}"
