"""The process that renders chat templates: started when first needed, shared, replaced when it had to be ended.

A template is a program from a checkpoint. Jinja's sandbox keeps it from other objects, but not from taking all the time
and memory there is, so it runs beside this process (`template_worker`), under limits that the system enforces.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from vlcache_jax.files import limits

_START_SECONDS = 60
_LONGEST_LINE = 12 * limits.PROMPT_CHARACTERS + 1000  # JSON writes a character in at most twelve
_WORKER = Path(__file__).with_name("template_worker.py")


class TemplateProcess:
    """One worker at a time, for all threads. Safe to fork: a child starts a worker of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """The worker's answer to `request` (see `template_worker`).

        What ended the worker is an answer as well: {"error": "time"}, or {"error": "ended", "message": how}. If none
        can be started, {"error": "start", "message": why}.
        """
        line = json.dumps(request).encode("ascii") + b"\n"
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._end()  # by somebody else, since the last request
            if self._process is None:
                reason = self._start()
                if reason is not None:
                    return {"error": "start", "message": reason}
            line, late = self._exchange(line, limits.TEMPLATE_WALL_SECONDS)
            answer = _parse(line)
            if answer is not None and not late:
                if answer.get("error") == "memory":
                    self._end()  # what is left of its memory may be in pieces
                return answer
            status = self._end()
        if late or status == -getattr(signal, "SIGPROF", 0):
            return {"error": "time", "message": ""}
        return {"error": "ended", "message": f"status {status}"}

    def close(self) -> None:
        """Ends the worker, if there is one."""
        with self._lock:
            self._end()

    def _start(self) -> str | None:
        settings = {
            "path": [entry for entry in sys.path if entry],
            "seconds": limits.TEMPLATE_SECONDS,
            "bytes": limits.TEMPLATE_MEGABYTES * 2**20,
            "characters": limits.PROMPT_CHARACTERS,
        }
        if not sys.executable:
            return "this program does not know its Python interpreter (sys.executable)"
        # A session of its own, so that Ctrl-C in a terminal reaches only this process.
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WORKER), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        answer, _ = self._exchange(b"", _START_SECONDS)
        if answer != b"ready\n":
            return f"it ended with status {self._end()} before it was ready"
        return None

    def _exchange(self, line: bytes, seconds: float) -> tuple[bytes, bool]:
        """What the worker answers to `line`, cut short if it ended; and whether it had to be ended after `seconds`."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return process.stdout.readline(_LONGEST_LINE), late.is_set()
        except BrokenPipeError:
            return b"", late.is_set()
        except BaseException:  # Ctrl-C: its answer must not become the next request's
            self._end()
            raise
        finally:
            timer.cancel()

    def _end(self) -> int | None:
        """Ends and forgets the worker. Returns its status: negative, the signal that ended it."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for stream in (process.stdout, process.stdin):
            with contextlib.suppress(OSError):  # what was not written yet finds no reader
                if stream is not None:
                    stream.close()
        return process.wait()

    def _forget(self) -> None:
        """In a forked child: the worker and the lock belong to the parent."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process is not None:
            process.returncode = 0  # not this process's child: nothing to wait for
            for stream in (process.stdout, process.stdin):
                stream.raw.close()  # type: ignore[union-attr]  # nothing is flushed into the parent's pipe


def _parse(line: bytes) -> dict[str, str] | None:
    # The worker is trusted no further than the template that it runs.
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(answer, dict) and all(isinstance(value, str) for value in answer.values())
    return answer if valid and ("text" in answer or "error" in answer) else None


SHARED = TemplateProcess()
"""The one that all templates of this process use."""

atexit.register(SHARED.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SHARED._forget)
