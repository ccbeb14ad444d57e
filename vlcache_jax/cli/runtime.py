"""Compiled programs: keeping them between runs, and telling compile time from run time."""

import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

_COMPILE_EVENTS = "/jax/core/compile/"


def use_compilation_cache(enabled: bool) -> None:
    """Keeps compiled programs in `$VLCACHE_JAX_CACHE_DIR`, or `vlcache_jax` in the user's cache folder.

    A folder that cannot be written costs compile time, not the run.
    """
    folder = cache_folder()
    if not enabled:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        print(f"note: no compilation cache in {folder} ({error}): programs are compiled anew", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_folder() -> Path:
    """Where compiled programs are kept."""
    if chosen := os.environ.get("VLCACHE_JAX_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "vlcache_jax"


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


def describe_runtime() -> dict[str, Any]:
    """Versions and device, for JSON output."""
    import flax

    import vlcache_jax

    device = jax.devices()[0]
    versions = {
        "vlcache_jax": vlcache_jax.__version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
    }
    return {
        "versions": versions,
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
    }
