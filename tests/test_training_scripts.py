"""The scripts of `examples/` at the demo model's size: they learn, go on where they stopped, leave what they say."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import vlcache_jax as vlc
from vlcache_jax.demo.assets import MODEL, demo_assets

EXAMPLES = Path(__file__).parent.parent / "examples"
ASSETS = demo_assets(None)
TUNING = (
    "--model",
    ASSETS / MODEL,
    "--data",
    ASSETS / "demo_images",
    "--rows",
    4,
    "--length",
    640,
    "--dtype",
    "float32",
)


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("finetune", "lora", "rollouts"):
        sys.modules.pop(name, None)


def run(name, *options):
    return importlib.import_module(name).main([str(x) for x in options])


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_scripts_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 150, path


@pytest.mark.parametrize("name", [pytest.param("finetune", marks=pytest.mark.thorough), "lora"])
def test_fine_tuning(tmp_path, name):
    """Adapters alone, and everything on a mesh; the second call goes on after the first."""
    mesh = ("--mesh", "data=2,fsdp=2,model=2") if name == "finetune" else ()
    options = (*TUNING, *mesh, "--output", tmp_path, "--save-every", 1, "--rate", 1e-3, "--accumulate", 1)
    run(name, *options, "--steps", 1)
    run(name, *options, "--steps", 3)
    found = lines(tmp_path)
    assert [x["step"] for x in found] == [1, 2, 3]
    assert all(np.isfinite(x["loss"]) for x in found)
    if name == "lora":
        assert {x.name for x in (tmp_path / "adapters").iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors",
        }  # fmt: skip
    else:
        tuned, before = vlc.load(tmp_path / "model", dtype="float32"), vlc.load(ASSETS / MODEL, dtype="float32")
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), tuned.params, before.params)
        assert all(jax.tree.leaves(same["vision"]))
        assert not any(jax.tree.leaves(same["projector"]))


@pytest.mark.thorough
def test_rollouts(tmp_path):
    options = (
        "--output",
        tmp_path,
        "--prompts",
        2,
        "--samples",
        2,
        "--held-out",
        0,
        "--save-every",
        1,
        "--disturb",
        0.3,
    )
    run("rollouts", *options, "--steps", 1)
    run("rollouts", *options, "--steps", 2)
    found = lines(tmp_path)
    assert [x["step"] for x in found] == [1, 2]
    assert all(0 <= x["reward"] <= 1 and x["mismatch"] > 0 for x in found)
