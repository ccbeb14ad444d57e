"""Telling compile time from run time."""

import time
from types import TracebackType

import jax

_COMPILE_EVENTS = "/jax/core/compile/"


class Stopwatch:
    """Wall-clock seconds of a `with` block, compile time apart.

    Attributes:
      compile: seconds in which programs were traced, lowered and compiled, or read from the compilation cache.
      run: the other seconds of the block.
    """

    def __init__(self) -> None:
        self.compile = self.run = 0.0
        self._spans: list[tuple[float, float]] = []

    def __enter__(self) -> "Stopwatch":
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        self._start = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop = time.monotonic()
        jax.monitoring.unregister_event_duration_listener(self._on_event)
        self.compile = _covered(self._spans, self._start)
        self.run = stop - self._start - self.compile

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith(_COMPILE_EVENTS):
            now = time.monotonic()
            self._spans.append((now - duration_secs, now))


def _covered(spans: list[tuple[float, float]], start: float) -> float:
    """Seconds from `start` on that lie in any of the spans: inner programs are traced within outer ones."""
    total, reached = 0.0, start
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, reached))
        reached = max(reached, last)
    return total
