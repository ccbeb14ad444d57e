"""The host's side of a training run: data ahead of time, progress for people and for plots."""

import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from vlcache_jax.files.writing import append_line, make_folder
from vlcache_jax.terminal.progress import Progress

T = TypeVar("T")


def prefetch(items: Iterator[T], size: int = 2) -> Iterator[T]:
    """Yields `items` in order, made by a thread that runs up to `size` items ahead. Errors come through."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(size)
    closed = threading.Event()

    def put(item: tuple[Any, BaseException | None]) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except Exception as error:
            put((None, error))

    threading.Thread(target=fill, daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()


class ProgressLog:
    """Writes one JSON object per report to a file, and a readable line to `progress` (by default on standard error).

    Tokens per second are counted since the last report.
    """

    def __init__(self, path: str | os.PathLike[str], progress: Progress | None = None) -> None:
        make_folder(Path(path).parent)
        self._path, self._progress = Path(path), Progress() if progress is None else progress
        self._tokens, self._since = 0, time.monotonic()

    def count(self, tokens: int) -> None:
        """Adds tokens that were trained on."""
        self._tokens += tokens

    def report(self, **values: float | int | str) -> None:
        """Reports the values given, with tokens per second where `count` was called."""
        now = time.monotonic()
        if self._tokens:
            values["tokens_per_second"] = round(self._tokens / (now - self._since))
            self._tokens = 0
        self._since = now
        values = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        append_line(self._path, json.dumps({"time": round(time.time(), 1), **values}))
        self._progress.note("  ".join(f"{k} {v}" for k, v in values.items()))
