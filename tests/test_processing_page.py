"""The code of docs/inputs.md runs as it is written, on the shipped checkpoint."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

import vlcache_jax as vlc
from vlcache_jax.models.processor import Processor

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "vlcache_jax" / "assets" / "demo_model"


def test_the_page(tmp_path, monkeypatch, capsys):
    def load(path: str, **options: Any) -> Any:
        return SimpleNamespace(processor=Processor.from_folder(DEMO, **options))

    monkeypatch.setattr(vlc, "load", load)
    monkeypatch.chdir(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8))
    image.save("cat.jpg")
    names: dict[str, Any] = {"vlc": vlc, "path": DEMO, "images": [[image]], "text": ["<image>\nWhat is this?"]}
    batches = []
    for code in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/inputs.md").read_text("utf-8"), re.M | re.S):
        names["token"] = names["vlm"].processor.tokenizer.encode("salary", False)[0] if "vlm" in names else None
        exec(compile(code, "inputs.md", "exec"), names)
        batches.append(names["batch"])
    assert batches[0].length == 1536
    assert batches[0].pixels.shape[1] == 5
    assert batches[1].length == 1024
    assert capsys.readouterr().out.strip()
