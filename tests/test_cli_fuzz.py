"""Every option of every command with values that no one should type: an error in one line, or the command begins."""

import argparse
import functools
import importlib
from pathlib import Path
from typing import Any

import pytest

from vlcache_jax.cli import checkpoint, demo, generate, study, train_demo
from vlcache_jax.cli.checkpoint import OpenedCheckpoint, open_checkpoint
from vlcache_jax.cli.main import main
from vlcache_jax.cli.parser import build_parser
from vlcache_jax.errors import PolicyError, VLCacheError
from vlcache_jax.policies import METHODS, policy_by_name

DEMO = Path(demo.__file__).parent.parent / "assets" / "demo_model"
IMAGE = DEMO.parent / "demo_images" / "document_1.png"
# fmt: off
NASTY = [
    "", " ", "\t\n", "\r", "0", "-0", "-1", "-5MB", "+7", "1.5", "1e3", "1e-320", "1e308", "1e999", "-1e999", "nan",
    "-nan", "inf", "infinity", "infMB", "nan%", "0x10", "1_000", "1,000", "1 000", "\u0661\u0662", "\uff11",
    "\u00b2", "\u221e", "9" * 30, "9" * 5000, "-" + "9" * 30, "0." + "0" * 400 + "1", "9" * 30 + "GiB", "64\u212aB",
    "0MB", "%", "MB", "10%%", "mass:", "mass:nan:0.5", "mass:0.5:0.5:0.5", "mass:1e999:1", "a\0b", "\0", "\udcff",
    "\ud800", "x" * 5000, "x" * 300 + "/y", "/", ".", "..", "/dev/null", "/dev/full", "~", "--", "-", "-h",
    "\N{GRINNING FACE}", "a=b=c", "=", "data=0", "data=\u0663", "v5e:0x0", "v5e:9999999999x1", "v5e:1x-1", ":", "full:",
    "full:0.5", "None", "True", "[]", "{}", "$(exit 1)", "'", '"',
]
# fmt: on
COMMANDS = {
    "demo": ["--assets", str(DEMO.parent), "--image", str(IMAGE), "--question", "What is it?"],
    "generate": ["--model", str(DEMO), "--prompt", "What is this?"],
    "plan": ["--model", "llava-1.5-7b", "--topology", "v5e:1x1", "--prompt", "2048"],
    "train-demo": ["--output", "run"],
    "study": ["--output", "run"],
}


class Begins(Exception):
    """The command has checked everything, and begins."""


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def begin(*_: Any, **__: Any) -> None:
        raise Begins

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlcache_jax.cli.checkpoint.OpenedCheckpoint.load", begin)
    monkeypatch.setattr(importlib.import_module("vlcache_jax.planning.plan"), "_Planner", begin)
    monkeypatch.setattr("vlcache_jax.planning.programs.Programs.compile", begin)
    monkeypatch.setattr(train_demo, "train_demo", begin)
    monkeypatch.setattr(study, "run_study", begin)
    for module in (demo, generate, study, train_demo):
        monkeypatch.setattr(module, "keep_programs", lambda *_: None)
    for module in (demo, study, checkpoint):
        monkeypatch.setattr(module, "open_checkpoint", opened)


@functools.cache
def shared(*arguments: Any, **options: Any) -> OpenedCheckpoint:
    return open_checkpoint(*arguments, **options | {"image_limits": dict(options.get("image_limits", ()))})


def opened(*arguments: Any, image_limits: dict[str, int] | None = None, **options: Any) -> OpenedCheckpoint:
    """`open_checkpoint`, once for the same arguments."""
    return shared(*arguments, image_limits=tuple((image_limits or {}).items()), **options)


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> str | None:
    """The error, or None where the command began."""
    try:
        status = main(arguments)
    except Begins:
        capsys.readouterr()
        return None
    out, err = capsys.readouterr()
    if status == 0:
        assert out.startswith("usage: ")
        return None
    assert (status, out) == (2, ""), (status, out, err)
    errors = [line for line in err.split("\n") if line and not line.startswith("[ ")]  # the others are progress
    assert len(errors) == 1, err
    error = errors[0]
    assert error.startswith("vlcache-jax: error: "), error
    assert "Traceback" not in err
    return error


def options(command: str) -> list[str]:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    return [action.option_strings[-1] for action in actions if action.nargs != 0]


@pytest.mark.parametrize("command", COMMANDS)
def test_it_begins(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, command, *COMMANDS[command]) is None


@pytest.mark.parametrize(("command", "option"), [(c, o) for c in COMMANDS for o in options(c)])
def test_options(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    usual = COMMANDS[command]
    if option in usual:
        at = usual.index(option)
        usual = usual[:at] + usual[at + 2 :]
    for value in NASTY:
        outcome(capsys, command, *usual, option, value)
        if value[:1] in ("", "-"):  # argparse takes some of these for options
            outcome(capsys, command, *usual, f"{option}={value}")


NUMBERS = [word for word in NASTY if word[:1] in "+-0123456789.inN\u0661\uff11" and len(word) < 500]
OTHERS = ["true", "none", "some", "last:", "last:0", "last:" + "9" * 30, "last:\u0663", "window:" + "9" * 30, "evict:1"]


@pytest.mark.parametrize("name", METHODS)
def test_options_of_policies(name: str) -> None:
    with pytest.raises(PolicyError) as unknown:
        policy_by_name(f"{name},no_such=1")
    known = str(unknown.value).split("Known: ")[1].split(", ")
    for option in dict.fromkeys([*known, "decoding", "rows", "budget"]):
        for value in [*NUMBERS, *OTHERS]:
            try:
                policy = policy_by_name(f"{name},{option}={value}")
            except VLCacheError:
                continue
            hash(policy)
            assert policy.budget is not None
