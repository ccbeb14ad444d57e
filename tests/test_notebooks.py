"""The notebooks are what their sources say, and run in environments that hold nothing, from their own folder."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import jupytext  # noqa: F401  (the modules below need it; without it this file is left out by --core)
import pytest

ROOT = Path(__file__).parent.parent
COLAB = ROOT / "colab"
sys.path.insert(0, str(COLAB))
import make_notebooks  # noqa: E402
import run_notebook  # noqa: E402

NAMES = make_notebooks.NAMES


def test_every_notebook_has_a_source():
    assert sorted(path.stem for path in COLAB.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_in_step_with_its_source_and_without_outputs(name):
    text = (COLAB / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == make_notebooks.make_notebook(name, make_notebooks.repository()), (
        "run `python colab/make_notebooks.py`"
    )
    cells = json.loads(text)["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert sum("subprocess.run" in "".join(cell["source"]) for cell in cells) == 1  # installs itself


@pytest.mark.parametrize("name", NAMES)
def test_what_it_imports_of_this_library_exists(name):
    """Said at every submission; that they run is tested in turns."""
    source = ast.parse((COLAB / "sources" / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vlcache_jax"):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


EXPECTED = {
    "quickstart": ["full_cache: salary 9338", "vl_cache: salary 9338", "[['salary 9338', 'claim 8008', 'bonus 9897']]"],
    "evaluation": ["full_cache: measuring the prompts"],
    "own_policy": ["value_aware:0.05"],
    "training": ["under VL-Cache", "step 1: reward"],
}
SMALLER = {
    "evaluation": {"samples": "4"},
    "own_policy": {"samples": "4"},
    "training": {"steps": "2", "rows": "4", "rollout_steps": "1", "prompts": "2", "samples": "2", "held_out": "4"},
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_its_own_folder_in_an_empty_environment(name, tmp_path):
    """In a clone, whose notebook installs the library; nothing is changed but the size."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "build", "runs", "tests", "*.egg-info"))
    venv.create(tmp_path / "environment", with_pip=True)
    python = str(tmp_path / "environment" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "nbclient", "ipykernel"], check=True)
    clean = {key: x for key, x in os.environ.items() if not key.startswith(("XLA_", "PYTHON", "JAX_"))}
    command = [python, "run_notebook.py", name, *(f"{key}={x}" for key, x in SMALLER.get(name, {}).items())]
    done = subprocess.run(
        command, cwd=clone / "colab", capture_output=True, text=True, env=clean | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    assert "installed from the clone around this folder" in done.stdout
    assert all(text in done.stdout for text in EXPECTED[name]), done.stdout


def test_a_repository_gives_a_badge():
    """There is none yet: as soon as the package's metadata names one, notebooks open from it and install from it."""
    cells = json.loads(make_notebooks.make_notebook("quickstart", "someone/their.fork"))["cells"]
    assert (
        "colab.research.google.com/github/someone/their.fork/blob/main/colab/quickstart.ipynb" in cells[0]["source"][0]
    )
    assert any("git+https://github.com/someone/their.fork" in "".join(cell["source"]) for cell in cells)
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_parameters_that_a_notebook_does_not_have_are_refused():
    with pytest.raises(ValueError, match="own_policy has no parameters stepps"):
        run_notebook.run_notebook("own_policy", stepps="1")
