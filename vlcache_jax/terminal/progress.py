"""What a long run is doing, on standard error, from its first second."""

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Steps and notes for people; standard output is never touched.

    On a terminal the present step is one moving line with its seconds, or a bar with the time left, that disappears
    when it is over; notes stay above it. Elsewhere steps and notes are plain lines, each with the seconds since the
    start. A standard error that cannot be written costs the progress, not the run.

    Args:
      enabled: False shows nothing.

    Example:
      with Progress() as progress:
          progress.step("loading weights")
          progress.step("measuring", total=1096)
          progress.advance()
          progress.note("documents: measured before")
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled, self._start = enabled, time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, text: str, total: float | None = None) -> None:
        """The step before is over and this one begins; `total` is what its `advance` adds up to."""
        if not self._enabled:
            return
        self.close()
        if _on_a_terminal():
            self._bar = _bar(total)
            self._bar.add_task(text, total=total)
            self._bar.start()
        else:
            self._line(text)

    def advance(self, amount: float = 1) -> None:
        """So much more of the present step is done."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], amount)

    def describe(self, text: str) -> None:
        """Another text for the present step, on a terminal."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=text)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._enabled:
            self._line(text)

    def close(self) -> None:
        """Takes the moving line away, so that something else can be printed. A later step brings one back."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    def _line(self, text: str) -> None:
        if sys.stderr is None:  # print would take standard output
            return
        with contextlib.suppress(OSError, ValueError):  # full, gone or closed
            print(f"[{time.monotonic() - self._start:6.1f} s] {text}", file=sys.stderr, flush=True)


def _on_a_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb")


def _bar(total: float | None) -> Any:
    from rich import progress  # only here: it takes a tenth of a second
    from rich.console import Console
    from rich.table import Column

    text = progress.TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
    columns: list[Any] = [progress.SpinnerColumn(), text]
    if total is None:
        columns.append(progress.TimeElapsedColumn())
    else:
        columns += [
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
        ]
    return progress.Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
