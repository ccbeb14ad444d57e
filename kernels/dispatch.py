"""Choosing the implementation of an op."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax

Implementation = Callable[..., Any]


def dispatch(
    name: str | None,
    implementations: Mapping[str, Implementation],
    order: Mapping[str, Sequence[str]],
    *args: Any,
) -> Any:
    """Calls the named implementation, or the first one in the platform's order that serves the arguments.

    The platform is the one that the program is lowered for, not the device that happens to be attached: a machine
    without a TPU compiles programs for one.

    Args:
      name: of the only implementation to try, or None.
      implementations: by name. One that cannot serve the arguments raises NotImplementedError with the reason.
      order: for each platform ("tpu", "cuda", and "default" for all others) the names to try, the best first. The last
        one must serve every argument.
      *args: pytrees of arrays.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: the named implementation cannot serve the arguments.
    """
    if name is not None:
        if name not in implementations:
            raise ValueError(f"implementation {name!r} is not one of {sorted(implementations)}")
        return _in_32_bits(implementations[name])(*args)

    def first_of(names: Sequence[str]) -> Implementation:
        def call(*args: Any) -> Any:
            for choice in names[:-1]:
                try:
                    return implementations[choice](*args)
                except NotImplementedError:
                    continue
            return implementations[names[-1]](*args)

        return _in_32_bits(call)

    default = order["default"]
    special = {platform: first_of(names) for platform, names in order.items() if names != default}
    if not special:
        return first_of(default)(*args)
    return jax.lax.platform_dependent(*args, default=first_of(default), **special)


def bound(implementations: Mapping[str, Implementation], interpret: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """The implementations with what all of them take; those of Pallas know `interpret` besides."""
    pallas = {"interpret": interpret}
    return {
        name: partial(function, *args, **options, **(pallas if name.startswith(("pallas", "splash")) else {}))
        for name, function in implementations.items()
    }


def _in_32_bits(function: Implementation) -> Implementation:
    def call(*args: Any) -> Any:
        with jax.enable_x64(False):
            return function(*args)

    return call
