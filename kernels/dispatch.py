"""Choosing the implementation of an op."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax

from vlcache_jax.kernels.cards import OnCard

Implementation = Callable[..., Any]

_SCOPE = re.compile(r"\b\w+=\w+(?: <[^>]*>)?")


def dispatch(
    op: str,
    wanted: str | tuple[str, ...] | None,
    implementations: Mapping[str, Implementation],
    order: Mapping[str, Sequence[str | OnCard]],
    *args: Any,
) -> Any:
    """Calls the first of the wanted implementations, or of the platform's order, that serves the arguments.

    The platform is the one that the program is lowered for, not the device that happens to be attached: a machine
    without a TPU compiles programs for one. What was chosen, and why what comes before it was not, is a name scope of
    its operations, such as "decode_attention=xla <pallas_tpu: 1000 slots ...>": a compiled program tells
    (`implementations`), and so does a profile.

    Args:
      op: its name.
      wanted: a name that is tried alone, several that are tried in turn, or None.
      implementations: by name. One that cannot serve the arguments raises NotImplementedError with the reason.
      order: for each platform ("tpu", "cuda", and "default" for all others) the names to try, the best first; an
        `OnCard` where such a card is attached. The last one must serve every argument.
      *args: pytrees of arrays.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: none of the wanted implementations can serve the arguments.
    """

    def first_of(names: Sequence[str | OnCard], of_several: bool = False) -> Implementation:
        def call(*args: Any) -> Any:
            reasons: list[str] = []
            for name in names:
                if isinstance(name, OnCard):
                    missing, name = name.missing(), name.name
                    if missing:
                        reasons.append(f"{name}: {missing}")
                        continue
                try:
                    run = implementations[name]
                    with jax.enable_x64(False), jax.named_scope(_scope(op, name, reasons)):
                        return (_traced_once(run) if of_several else run)(*args)
                except NotImplementedError as error:
                    if isinstance(wanted, str):
                        raise
                    reasons.append(str(error) if str(error).startswith(f"{name}:") else f"{name}: {error}")
            raise NotImplementedError("no implementation serves the arguments. " + "; ".join(reasons))

        return call

    if wanted is not None:
        names = wanted if isinstance(wanted, tuple) else (wanted,)
        for name in names:
            if name not in implementations:
                raise ValueError(f"implementation {name!r} is not one of {sorted(implementations)}")
        return first_of(names)(*args)
    default = order["default"]
    special = {platform: first_of(names, True) for platform, names in order.items() if names != default}
    if not special:
        return first_of(default)(*args)
    return jax.lax.platform_dependent(*args, default=first_of(default, True), **special)


def _traced_once(implementation: Implementation) -> Implementation:
    """`implementation`, whose Python runs once for arguments of the same types, whatever the platform and the program.

    What is compiled for one platform is traced for all, several of which often run the same implementation.
    """
    whole = implementation if isinstance(implementation, partial) else partial(implementation)
    return _jitted(whole.func, whole.args, tuple(sorted(whole.keywords.items())))


@lru_cache(maxsize=1024)
def _jitted(function: Implementation, args: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> Implementation:
    return jax.jit(partial(function, *args, **dict(options)), inline=True)


def _scope(op: str, name: str, reasons: Sequence[str]) -> str:
    because = "; ".join(reasons).translate({ord(x): None for x in '<>"\\'}).replace("/", " by ")
    return f"{op}={name}" + (f" <{because}>" if reasons else "")


def implementations(text: str) -> tuple[str, ...]:
    """How each op runs in a compiled program (`compiled.as_text()`), and why not by what is tried before.

    Example:
      implementations(compiled.as_text())  # ("append=pallas_tpu", "attention=xla_wide <splash_tpu: ...>")
    """
    found = (_SCOPE.search(place) for place in re.findall(r'op_name="([^"]*)"', text))
    return tuple(sorted({match[0].replace("\\'", "'") for match in found if match}))  # the text escapes quotes


def bound(implementations: Mapping[str, Implementation], interpret: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """The implementations with what all of them take; those of Pallas know `interpret` besides."""
    pallas = {"interpret": interpret}
    return {
        name: partial(function, *args, **options, **(pallas if name.startswith(("pallas", "splash")) else {}))
        for name, function in implementations.items()
    }
