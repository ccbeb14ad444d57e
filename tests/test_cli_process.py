"""The command line as a process of its own, and its exit statuses."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from tiny_checkpoints import make_tiny_llava

import vlcache_jax
from vlcache_jax.cli.main import main

COMMAND = [sys.executable, "-m", "vlcache_jax"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=300, env=os.environ | environment
    )


def test_help_and_bad_arguments() -> None:
    started = time.process_time(), os.times().children_user
    shown = run("--help")
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in ("demo", "generate", "train-demo"))
    refused = run("generate", "--model", "absent", "--prompt", "x", "--top-k", "much")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("vlcache-jax: error: argument --top-k: 'much' is not a whole number")
    assert "Traceback" not in refused.stderr
    # CPU time of both, which other processes on the machine do not change.
    assert os.times().children_user - started[1] < 2 * 3


def test_closed_pipe() -> None:
    with subprocess.Popen(
        [*COMMAND, "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_one_json_object_and_cached_programs(tmp_path: Path) -> None:
    make_tiny_llava(tmp_path / "model")
    arguments = ["generate", "--model", str(tmp_path / "model"), "--prompt", "w1 w2", "--max-new-tokens", "4", "--json"]
    cache = {"VLCACHE_JAX_CACHE_DIR": str(tmp_path / "cache")}
    cold, warm = (json.loads(run(*arguments, **cache).stdout) for _ in range(2))
    assert any((tmp_path / "cache").iterdir())
    assert warm["token_ids"] == cold["token_ids"]
    assert warm["seconds"]["compile"] < cold["seconds"]["compile"]


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlcache-jax {vlcache_jax.__version__}\n"


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlcache_jax.cli.generate.open_asked", interrupt)
    assert main(["generate", "--model", "m", "--prompt", "p"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "error" not in err


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("vlcache_jax.cli.generate.open_asked", lambda *_, **__: jnp.zeros((1 << 24, 1 << 24)) + 1)
    assert main(["generate", "--model", "m", "--prompt", "p"]) == 3
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("vlcache-jax: error: out of memory (RESOURCE_EXHAUSTED")
    assert "candidate_fraction" in errors[0]


class TestTrainDemo:
    @pytest.fixture(autouse=True)
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
        calls: list[tuple[Any, dict[str, Any]]] = []
        monkeypatch.setattr("vlcache_jax.cli.train_demo.train_demo", lambda path, **kw: calls.append((path, kw)))
        return calls

    def test_passes_its_arguments_on(self, calls: list, tmp_path: Path) -> None:
        arguments = ["train-demo", "--output", str(tmp_path / "new"), "--steps", "3", "--no-compilation-cache"]
        assert main(arguments) == 0
        ((folder, options),) = calls
        assert folder == tmp_path / "new"
        assert {name: options[name] for name in ("minutes", "steps", "resume")} == {
            "minutes": None,
            "steps": 3,
            "resume": False,
        }
        (tmp_path / "new" / "state").mkdir()
        (tmp_path / "new" / "state" / "state.safetensors").touch()
        assert main([*arguments, "--resume"]) == 0
        assert calls[1][1]["resume"] is True

    def test_refuses(self, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "state.safetensors").touch()
        (tmp_path / "file").touch()
        for arguments, message in (
            (["--output", str(tmp_path)], "add --resume"),
            (["--output", str(tmp_path / "new"), "--resume"], "no run to go on with"),
            (["--output", str(tmp_path / "file")], "is a file"),
            (["--output", str(tmp_path / "new"), "--minutes", "0"], "minutes=0 is out of range"),
        ):
            assert main(["train-demo", *arguments]) == 2
            assert message in capsys.readouterr().err
        assert calls == []
