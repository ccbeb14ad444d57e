"""The process around a command: standard streams that may be closed or full, Ctrl-C and SIGTERM.

Python runs signal handlers between two instructions of the main thread: not while XLA compiles, and what they raise is
lost where a library catches everything. So a thread hears of each signal at once, leaves the main thread a moment to
tidy up, and then ends the process, whatever it is doing.
"""

import contextlib
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

PROGRAM = "vlcache-jax"
FAILURE, BAD_INPUT, OUT_OF_MEMORY, BROKEN_PIPE = 1, 2, 3, 141
GRACE_SECONDS = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Failed(Exception):
    """Something that was asked for rightly could not be done: a full disk, a closed stream."""


class Signals:
    """Ends the process on Ctrl-C (status 130) and SIGTERM (143).

    Attributes:
      status: the exit status of the signal that has come; None before.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self._at_once = False

    def listen(self) -> None:
        """Begins to; a signal that the process was told to ignore, as shells tell background jobs, stays ignored."""
        wanted = [signum for signum in _SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._end, args=(reader,), daemon=True).start()
        for signum in wanted:
            signal.signal(signum, self._interrupt)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, the process ends without tidying up: for imports, where an exception may be printed or lost."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    @contextlib.contextmanager
    def left_to_others(self) -> Iterator[None]:
        """Within, somebody else handles signals, and takes the time to: a server that ends what it is doing."""
        if threading.current_thread() is not threading.main_thread():
            yield  # of a program that calls the command
            return
        waking = signal.set_wakeup_fd(-1)
        try:
            yield
        finally:
            signal.set_wakeup_fd(waking)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.status = 128 + signum
        if self._at_once:
            leave(self.status)
        # What is interrupted somewhere inside must not write traces beside the exit.
        sys.unraisablehook = _ignore
        threading.excepthook = _ignore
        raise KeyboardInterrupt

    @staticmethod
    def _end(reader: int) -> NoReturn:
        signum = os.read(reader, 1)[0]
        select.select([reader], [], [], GRACE_SECONDS)  # or a second signal
        leave(128 + signum)


SIGNALS = Signals()


def _ignore(_: object) -> None:
    pass


def leave(status: int) -> NoReturn:
    """Ends the process at once, without waiting for threads that compile."""
    with contextlib.suppress(Exception):
        if os.isatty(2):
            os.write(2, b"\r\x1b[K\x1b[?25h")  # a moving line may have hidden the cursor
    os._exit(status)


def prepare_streams() -> None:
    """Makes the three standard streams usable: a file opened later must never take the number of a closed one.

    Raises Failed if standard output is closed.
    """
    closed = sys.stdout is None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    # Unbuffered, so that nothing which could not be written is tried again at the end and changes the status; and a
    # terminal without é gets \xe9, not an error.
    encoding = sys.stderr.encoding if sys.stderr is not None else "utf-8"
    raw = open(2, "wb", buffering=0, closefd=False)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(raw, encoding, errors="backslashreplace", write_through=True)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if closed:
        sys.stdout = sys.stderr
        raise Failed("standard output is closed, and results go there: leave it open, or send it to /dev/null")


def emit(text: str, end: str = "\n") -> None:
    """Writes a result to standard output.

    Raises:
      BrokenPipeError: its reader has gone.
      Failed: it cannot be written.
    """
    with writing_output():
        print(text, end=end, flush=True)


@contextlib.contextmanager
def writing_output() -> Iterator[None]:
    """Turns what goes wrong with standard output into `Failed`; a broken pipe stays one."""
    try:
        yield
    except OSError as error:
        # Python writes what is left once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise Failed(f"standard output cannot be written ({error.strerror or error})") from error


def complain(message: str) -> None:
    """Writes an error, as one line, to standard error."""
    remark(f"{PROGRAM}: error: {' '.join(message.splitlines())}")


def remark(text: str) -> None:
    """Writes a line for people to standard error, if that can be written."""
    text = text.encode(errors="backslashreplace").decode()  # paths may hold bytes that are no text
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
