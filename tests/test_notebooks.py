"""The notebooks are what their sources say, and run from their own folder in a process of their own."""

import ast
import importlib
import json
import shutil
import sys
from pathlib import Path

import jupytext  # noqa: F401  (the modules below need it; without it this file is left out by --core)
import pytest

COLAB = Path(__file__).parent.parent / "colab"
sys.path.insert(0, str(COLAB))
import make_notebooks  # noqa: E402
import run_notebook  # noqa: E402

NAMES = make_notebooks.NAMES


def test_every_notebook_has_a_source():
    assert sorted(path.stem for path in COLAB.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_in_step_with_its_source_and_without_outputs(name):
    text = (COLAB / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == make_notebooks.make_notebook(name), "run `python colab/make_notebooks.py`"
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
def test_runs_from_its_own_folder(name, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # as users compile
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    shutil.copy(COLAB / f"{name}.ipynb", tmp_path)
    printed = run_notebook.run_notebook(name, tmp_path, **SMALLER.get(name, {}))
    assert all(text in printed for text in EXPECTED[name]), printed


def test_parameters_that_a_notebook_does_not_have_are_refused():
    with pytest.raises(ValueError, match="own_policy has no parameters stepps"):
        run_notebook.run_notebook("own_policy", stepps="1")
