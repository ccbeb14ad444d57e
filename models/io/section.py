"""One JSON object of a config file: every value is checked when it is read."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlcache_jax.errors import CheckpointError, VLCacheError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.files.limits import IMAGE_SIDE, TOKEN_ID, TOKEN_IDS, Range
from vlcache_jax.models.activations import activation


class Section:
    """An object with its defaults and its name for messages. All that it raises are CheckpointErrors."""

    def __init__(self, file: Path, name: str, values: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.file, self.name, self.values, self.defaults = file, name, values, defaults

    def get(self, key: str, default: Any = None) -> Any:
        """The value, unchecked; JSON null stays None (it means something for some keys)."""
        return self.values.get(key, self.defaults.get(key, default))

    def error(self, key: str, value: Any, expected: str) -> CheckpointError:
        """What to raise for a value that cannot be."""
        full = f"{self.name}.{key}" if self.name else key
        return CheckpointError(f"{self.file}: {full} is {shorten(value)}; expected {expected}")

    def section(self, key: str, defaults: dict[str, Any] | None = None) -> "Section":
        """An object within this one; an empty one if it is absent or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, value, "an object")
        return Section(self.file, f"{self.name}.{key}".lstrip("."), value or {}, defaults or {})

    def integer(self, key: str, limits: Range) -> int:
        """A whole number within limits; true and false are none."""
        value = self.get(key)
        if type(value) is not int or value not in limits:
            raise self.error(key, value, f"a whole number {limits}")
        return value

    def number(self, key: str, limits: Range, default: float | None = None) -> float:
        """A number within limits."""
        value = self.get(key, default)
        if type(value) not in (int, float) or value not in limits:
            raise self.error(key, value, f"a number {limits}")
        return float(value)

    def optional_number(self, key: str, limits: Range) -> float | None:
        """A number within limits, or None if it is absent or null."""
        return None if self.get(key) is None else self.number(key, limits)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.error(key, value, "true or false")
        return value

    def choice(self, key: str, default: str, supported: Iterable[str], hint: str = "") -> str:
        """One of some texts; `hint` ends the message if it is none of them."""
        value, supported = self.get(key, default), list(supported)
        if value not in supported:
            near = difflib.get_close_matches(str(value)[:100], supported, n=len(supported), cutoff=0.0)
            raise self.error(key, value, f"one of the supported {', '.join(near)}{hint}")
        return value

    def activation(self, key: str, default: str) -> str:
        """The name of an activation function."""
        value = self.get(key, default)
        try:
            activation(value)
        except VLCacheError as error:
            raise self.error(key, value, f"an activation function; {error}") from None
        return value

    def square(self, key: str) -> int:
        """A side length in pixels, which may be given as two equal ones."""
        value = self.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int or value not in IMAGE_SIDE:
            raise self.error(key, self.get(key), f"a whole number {IMAGE_SIDE} (or two equal ones)")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or several; none if absent, null or negative (some files mean "no such token" by -1)."""
        value = self.get(key)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if len(values) > TOKEN_IDS or not all(type(v) is int and v in TOKEN_ID for v in values):
            raise self.error(key, value, f"a token id {TOKEN_ID} or a list of at most {TOKEN_IDS} of them")
        return tuple(v for v in values if v >= 0)
