"""The code of the guide, the training page and others runs as it is written, on the shipped checkpoint."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

import vlcache_jax as vlc

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "vlcache_jax" / "assets" / "demo_model"


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(autouse=True)
def compilation_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pages may switch it on: into a folder of the test's, and no longer than the test."""
    monkeypatch.setenv("VLCACHE_JAX_CACHE_DIR", str(tmp_path / "programs"))
    names = "compilation_cache_dir persistent_cache_min_compile_time_secs persistent_cache_min_entry_size_bytes"
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names.split()}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take for granted; every folder of weights is the shipped checkpoint."""
    load = vlc.load

    def shipped(path: str, mesh: Any = None, param_dtype: Any = None, layout: Any = None, **_: Any) -> vlc.VLM:
        layout = "stacked" if param_dtype else layout  # to train
        return load(str(DEMO), dtype="float32", mesh=mesh, layout=layout)

    monkeypatch.setattr(vlc, "load", shipped)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    rng = np.random.default_rng(0)
    first, second = (Image.fromarray(rng.integers(0, 255, (512, 512, 3), np.uint8)) for _ in range(2))
    first.save("cat.jpg")
    given = {"jax": jax, "vlc": vlc, "NamedSharding": NamedSharding, "PartitionSpec": PartitionSpec}
    return {**given, "__name__": "page", "path": "folder", "first": first, "second": second}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::vlcache_jax.errors.PlacementWarning")  # 2 KV heads, an axis of 4
def test_the_guide(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for code in snippets("guide.md"):
        names |= {"layer": 0, "tokens": jnp.zeros(names["batch"].size, jnp.int32)} if "batch" in names else {}
        if "pmap" in code:
            names["split_batch"] = jax.tree.map(lambda x: jnp.stack([x] * jax.device_count()), names["batch"])
        if "make_mesh" in code:
            names["batch"] = jax.tree.map(lambda x: np.concatenate([x] * 2), names["batch"])
        exec(compile(code, "guide.md", "exec"), names)
        if "pmap" in code:  # every device gave the answer of the plain call
            alone = names["rollout"](names["vlm"].params, names["batch"])
            assert np.array_equal(np.asarray(names["tokens"]), np.stack([alone] * jax.device_count()))
    assert isinstance(names["out"], vlc.Generation)
    assert names["mesh"].size == 8
    assert capsys.readouterr().out.strip()  # the stream


@pytest.mark.thorough
def test_the_training_page(names: dict[str, Any]) -> None:
    prompts, answers = ["<image>\nRead the value of salary on this page"] * 4, ["salary 9338"] * 4
    names["data"] = [([[names["first"]]] * 4, prompts, answers)] * 2
    code, lora, rollouts = snippets("training.md")
    exec(compile(code, "training.md", "exec"), names)
    assert names["progress"] == {"epoch": 1}
    assert int(names["state"].step) == 2
    assert np.isfinite(float(names["metrics"]["loss"]))

    exec(compile(lora, "training.md", "exec"), names)
    assert {x.name for x in Path("adapters").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    vlm = names["vlm"]
    vlm.model.apply({"params": vlm.params}, names["batch"].batch, method="forward")  # merged: plain parameters again

    names["prompts"] = [names["vlm"].processor([[names["first"]]] * 2, prompts[:2])]
    names["judge"] = lambda texts: np.arange(16).reshape(2, 8) % 3
    exec(compile(rollouts, "training.md", "exec"), names)
    assert names["out"].full.shape == (2, 8, 64)
    assert float(names["metrics"]["gradient_norm"]) > 0


@pytest.mark.thorough
def test_the_pages_of_many_requests(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    names["paths"] = ["cat.jpg", "missing.jpg"]
    for code in snippets("engine.md"):
        exec(compile(code.replace("[(1024, 1), (2048, 3)]", "[(320, 1)]"), "engine.md", "exec"), names)
    assert "'missing.jpg') is missing: check the path" in capsys.readouterr().out
    assert names["engine"].stats().failed == 1
    line = {"images": ["cat.jpg"], "question": "What is this?", "answers": ["a cat"]}
    Path("docvqa.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    for code in snippets("evaluation.md"):
        exec(compile(code, "evaluation.md", "exec"), names)
    assert len(Path("runs/docvqa/full_cache.jsonl").read_text(encoding="utf-8").splitlines()) == 1
