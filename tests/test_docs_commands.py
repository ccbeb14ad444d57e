"""The shell commands of the README and the docs: that they parse, that their files exist, and that they run."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlcache_jax.cli.main import main
from vlcache_jax.cli.parser import build_parser

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))]


def blocks(page: str) -> list[list[list[str]]]:
    """The shell blocks of a page: commands, each a list of words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [list(_commands(block.replace("\\\n", " "))) for block in found]


def _commands(block: str) -> Iterator[list[str]]:
    for line in block.splitlines():
        for command in line.split(" && "):
            if words := shlex.split(command, comments=True):
                yield words


COMMANDS = [
    pytest.param(words[1:], id=f"{page}: {' '.join(words[:2])} {number}")
    for page in PAGES
    for number, words in enumerate(words for block in blocks(page) for words in block)
    if Path(words[0]).name == "vlcache-jax"
]


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("arguments", COMMANDS)
def test_it_parses_and_its_files_exist(arguments: list[str]) -> None:
    parsed = build_parser().parse_args(arguments)
    images = getattr(parsed, "image", [])
    assert all((ROOT / image).is_file() for image in images), images
    model = getattr(parsed, "model", None)
    here = model is None or (ROOT / model / "config.json").is_file()
    assert here or arguments[0] == "plan" or model.startswith("llava-hf/")  # on the Hugging Face Hub


def test_the_files_that_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(
            r"`((?:vlcache_jax|models|kernels|tests|benchmarks)/[\w./-]+)`", (ROOT / page).read_text()
        ):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_the_readme_can_be_pasted_from_its_start() -> None:
    """A shell that knows only python3: the environment is made, then activated, then its programs are called."""
    known, made = {"python3", "."}, False
    for block in blocks("README.md"):
        for words in block:
            program = words[0]
            if words[:3] == ["python3", "-m", "venv"]:
                made = True
            elif program == ".":
                assert made
                assert words[1] == ".venv/bin/activate"
                known |= {"python", "pip", "vlcache-jax"}
            elif program.startswith(".venv/bin/"):
                assert made
            else:
                assert program in known, f"{program} is not there yet: {' '.join(words)}"


RUN = [
    pytest.param(
        arguments.values[0],
        id=str(arguments.id),
        marks=[] if str(arguments.id).startswith("README") else [pytest.mark.thorough],
    )
    for arguments in COMMANDS
    if "vlcache_jax/assets/demo_model" in arguments.values[0]
    and arguments.values[0][0] != "serve"  # which does not end
]


@pytest.mark.parametrize("arguments", RUN)
def test_it_runs(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What needs no network and takes seconds. (The README's first command is run as it is by `.ci/run`.)"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vlcache_jax").symlink_to(ROOT / "vlcache_jax")
    image = ROOT / "vlcache_jax/assets/demo_images/document_1.png"
    question = {"id": "1", "image": str(image), "question": "Read the value of salary.", "answers": ["salary 9338"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    assert main([*arguments, "--no-compilation-cache"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert arguments[0] == "evaluate" or "cache held" in err
    assert (tmp_path / "kept.png").is_file() == ("--explain" in arguments)


def test_the_python_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vlcache_jax").symlink_to(ROOT / "vlcache_jax")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    answer, *_, held = capsys.readouterr().out.splitlines()
    assert answer == re.findall(r"# (salary .*)", code)[0]
    assert 0.1 < float(held.split()[0]) < 0.2
