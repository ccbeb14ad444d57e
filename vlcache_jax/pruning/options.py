"""Checks of a method's options."""

from collections.abc import Sequence
from typing import Any

from vlcache_jax.errors import PolicyError, is_number, is_whole


def check_part(method: str, **options: Any) -> None:
    """Raises PolicyError unless each option is a fraction from 0 to 1."""
    for name, value in options.items():
        if not is_number(value, 0, 1):
            raise PolicyError(f"{method}({name}={value}): give a fraction from 0 to 1")


def check_whole(method: str, least: int, **options: Any) -> None:
    """Raises PolicyError unless each option is a whole number of at least `least`."""
    for name, value in options.items():
        if not is_whole(value, least):
            raise PolicyError(f"{method}({name}={value}): give a whole number from {least} on")


def check_parts(method: str, layers: Sequence[int] | None, keep: Sequence[float], default: int) -> None:
    """Raises PolicyError unless `keep` are falling fractions, as many as `layers` or, if these are None, `default`."""
    if not all(is_number(part, 0, 1) for part in keep):
        raise PolicyError(f"{method}(keep={keep}): give fractions of the visual tokens, from 0 to 1")
    if not keep or list(keep) != sorted(keep, reverse=True):
        raise PolicyError(f"{method}(keep={keep}): give one fraction or more, none above the one before")
    if len(keep) != (default if layers is None else len(layers)):
        raise PolicyError(f"{method}(layers={layers}, keep={keep}): give as many layers as fractions")
