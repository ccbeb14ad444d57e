"""Progress: plain lines where nobody watches, one moving line on a terminal, and never a reason to fail."""

import os
import pty
import subprocess
import sys

import pytest

from vlcache_jax.terminal.progress import Progress

SCRIPT = """
from vlcache_jax.terminal.progress import Progress
with Progress() as progress:
    progress.step("first [step]")
    progress.step("second", total=2)
    progress.advance()
    progress.note("a line [that] stays")
print("result")
"""


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.step("loading")
        progress.step("measuring", total=2)
        progress.advance(2)
        progress.note("done")
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split("] ")[1] for line in err.splitlines()] == ["loading", "measuring", "done"]
    assert err.isprintable() or not set(err) - set(map(chr, range(32, 127))) - {"\n"}


def test_disabled(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(enabled=False) as progress:
        progress.step("loading")
        progress.note("done")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stream", ["None", "open('/dev/full', 'w')"])
def test_no_reason_to_fail(stream: str) -> None:
    code = f"import sys, io\nsys.stderr = {stream}\n{SCRIPT}\nimport os; os._exit(0)"
    done = subprocess.run([sys.executable, "-uc", code], stdout=subprocess.PIPE, check=True, text=True, timeout=60)
    assert done.stdout == "result\n"


def test_on_a_terminal() -> None:
    """The line moves, notes stay, results go to standard output alone, and the cursor is there again at the end."""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=follower, env=environment, check=True, timeout=60
    )
    os.close(follower)
    shown = b""
    while chunk := _read(leader):
        shown += chunk
    os.close(leader)
    text = shown.decode()
    assert done.stdout == b"result\n"
    assert "first [step]" in text
    assert "a line [that] stays\r\n" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 1 << 16)
    except OSError:  # Linux says so when the other end is closed
        return b""
