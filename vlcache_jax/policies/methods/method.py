"""What methods have in common: they are known by name, and options that they do not take are refused by name."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, get_args

from vlcache_jax.errors import PolicyError
from vlcache_jax.policies.policy import Policy
from vlcache_jax.terminal.words import nearest

Arguments = ParamSpec("Arguments")


@dataclasses.dataclass(frozen=True)
class Method:
    """A method that is known by name, as `method` was told.

    Attributes:
      name: of the policies that it makes.
      title: for people.
      make: from options to the policy. The default of its `budget` is the method's.
      query_agnostic: see `method`.
    """

    name: str
    title: str
    make: Callable[..., Policy]
    query_agnostic: bool = False


METHODS: dict[str, Method] = {}
"""All methods by name; `method` adds to it."""


def method(
    name: str, *, title: str | None = None, query_agnostic: bool = False
) -> Callable[[Callable[Arguments, Policy]], Callable[Arguments, Policy]]:
    """Decorates a method's function and makes it known by name: to `policy_by_name`, the command line and the study.

    An option that the function does not have, or settles itself, is a PolicyError.

    Args:
      name: on the command line, in files and reports: `Policy.name` of what the function makes. Another method of that
        name is replaced.
      title: for people; the name by default.
      query_agnostic: whether what it keeps hardly depends on the question, so that images may be compressed before
        there is one.

    Example:
      >>> @method("latest", title="Latest tokens")
      ... def Latest(budget: float = 0.1) -> Policy:
      ...     return Policy(name="latest", budget=budget, recent=1.0)
      >>> Latest(recent=0.5)
      Traceback (most recent call last):
      vlcache_jax.errors.PolicyError: Latest settles recent itself: use dataclasses.replace(Latest(...), recent=0.5)
      >>> del METHODS["latest"]
    """

    def register(function: Callable[Arguments, Policy]) -> Callable[Arguments, Policy]:
        known = options_of(function)

        @functools.wraps(function)
        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Policy:
            for option, value in kwargs.items():
                if option not in known:
                    raise PolicyError(_refusal(function.__name__, option, value, known))
            return function(*args, **kwargs)

        METHODS[name] = Method(name, title or name, checked, query_agnostic)
        return checked

    return register


def title_of(name: str) -> str:
    """What people call a policy; a policy that no method makes has its name only.

    Example:
      >>> title_of("vl_cache")
      'VL-Cache'
    """
    return METHODS[name].title if name in METHODS else name.replace("_", " ")


def options_of(function: Callable[..., Policy]) -> list[str]:
    """The names of all options of a method, those of `StoreOptions` or `Options` included."""
    parameters = inspect.signature(function).parameters
    known = [name for name in parameters if name != "options"]
    if "options" in parameters:
        known += get_args(parameters["options"].annotation)[0].__annotations__
    return known


def _refusal(name: str, option: str, value: Any, known: list[str]) -> str:
    if option == "evicted" and "merge" in known:
        return f"{name}({option}={value!r}): the option is called merge here"
    if option not in ("name", "budget") and option in (field.name for field in dataclasses.fields(Policy)):
        return f"{name} settles {option} itself: use dataclasses.replace({name}(...), {option}={value!r})"
    return f"{name} has no option {option!r}{nearest(option, known)}"
