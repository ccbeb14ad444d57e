"""The process around a command: closed, full and vanishing streams, Ctrl-C and SIGTERM at any moment."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlcache_jax

ASSETS = Path(vlcache_jax.__file__).parent / "assets"
ASK = ["generate", "--model", str(ASSETS / "demo_model"), "--prompt", "What is this?", "--no-compilation-cache"]


@pytest.fixture(autouse=True, scope="module")
def signals_not_ignored() -> Iterator[None]:
    """Where the tests run in the background Ctrl-C is ignored, which a program that they start would inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def shell(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell command in which `$@` is the program with the arguments."""
    return subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-m", "vlcache_jax", *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirection", "arguments", "status", "message"),
    [
        ("> /dev/full", ["--help"], 1, "standard output cannot be written (No space left on device)"),
        ("> /dev/full", ["--version"], 1, "standard output cannot be written (No space left on device)"),
        (">&-", ["--version"], 1, "standard output is closed"),
        (">&-", ["demo"], 1, "standard output is closed"),
        ("2>&-", ["nope"], 2, None),
        ("2> /dev/full", ["nope"], 2, None),
        (">&- 2>&-", ["--version"], 1, None),
        ("<&-", ["--version"], 0, None),
    ],
)
def test_streams(redirection: str, arguments: list[str], status: int, message: str | None, unbuffered: str) -> None:
    done = shell(f'PYTHONUNBUFFERED={unbuffered} "$@" {redirection}', *arguments)
    assert done.returncode == status, done
    if message is None:
        assert done.stderr == ""
    else:
        assert done.stderr.startswith(f"vlcache-jax: error: {message}")
        assert done.stderr.count("\n") == 1


def test_an_answer_that_cannot_be_written() -> None:
    done = shell('"$@" > /dev/full', *ASK, "--stream")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("vlcache-jax: error: standard output cannot be written")
    assert "Traceback" not in done.stderr


@pytest.mark.thorough
def test_a_file_never_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """With standard error closed the picture would otherwise be file 2, and what libraries print would be in it."""
    picture = tmp_path / "kept.png"
    image = ASSETS / "demo_images" / "document_1.png"
    done = shell('"$@" 2>&- <&-', *ASK, "--image", str(image), "--explain", str(picture), "--max-new-tokens", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert picture.read_bytes().endswith(b"IEND\xaeB`\x82")


def interrupted(*arguments: str, after: str, delay: float, signum: int = signal.SIGINT) -> tuple[int, str, float]:
    """Sends a signal `delay` seconds after a line of progress; returns status, standard error and seconds it took."""
    with subprocess.Popen(
        [sys.executable, "-m", "vlcache_jax", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        shown = ""
        while after not in shown:
            line = process.stderr.readline()
            assert line, shown
            shown += line
        time.sleep(delay)
        sent = time.monotonic()
        process.send_signal(signum)
        rest = process.stderr.read()
        return process.wait(60), shown + rest, time.monotonic() - sent


@pytest.mark.parametrize("delay", [0.0, 0.3, 0.8])
def test_interrupt_while_importing(delay: float) -> None:
    status, error, seconds = interrupted("demo", after="importing", delay=delay)
    assert status == 130
    assert "Traceback" not in error
    assert seconds < 5


@pytest.mark.parametrize(
    ("arguments", "after", "signum", "status"),
    [
        (ASK, "compiled in the first run", signal.SIGINT, 130),
        (ASK, "compiled in the first run", signal.SIGTERM, 143),
        pytest.param(
            ["study", "--samples", "2", "--batch", "2", "--tasks", "scenes"],
            "drawing",
            signal.SIGINT,
            130,
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            ["train-demo", "--steps", "9"], "training the vision", signal.SIGINT, 130, marks=pytest.mark.thorough
        ),
    ],
    ids=["generate", "SIGTERM", "study", "train-demo"],
)
def test_interrupt_while_compiling(arguments: list[str], after: str, signum: int, status: int, tmp_path: Path) -> None:
    where = [] if arguments is ASK else ["--output", str(tmp_path / "run"), "--no-compilation-cache"]
    found, error, seconds = interrupted(*arguments, *where, after=after, delay=1.0, signum=signum)
    assert found == status, error
    assert "Traceback" not in error
    assert seconds < 10


WORKERS = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from vlcache_jax.cli import main, parser

class Parser:
    def parse_args(self, argv):
        class Arguments:
            @staticmethod
            def run(arguments):
                print("working", file=sys.stderr, flush=True)
                try:
                    {body}
                except Exception:
                    pass
        return Arguments

parser.build_parser = Parser
sys.exit(main.main())
"""


@pytest.mark.parametrize(
    "body",
    [
        "with ThreadPoolExecutor(2) as pool: list(pool.map(time.sleep, [60, 60]))",  # waits for its workers
        "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)",  # Python waits for it at the end
    ],
    ids=["pool", "thread"],
)
def test_interrupt_with_workers(body: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WORKERS.format(body=body)], stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline() == "working\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == ""
