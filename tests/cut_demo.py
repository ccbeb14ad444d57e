"""The demo's checkpoint without most of its layers: small, complete, and no torch needed."""

import json
import re
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

import vlcache_jax as vlc

DEMO = Path(vlc.__file__).parent / "assets" / "demo_model"
LAYERS = 2


def cut_demo(target):
    """Writes it into a folder, which it returns."""
    for path in DEMO.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, target)
    config = json.loads((DEMO / "config.json").read_text())
    config["text_config"]["num_hidden_layers"], config["vision_config"]["num_hidden_layers"] = LAYERS, 1
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(DEMO / "model.safetensors")
    late = re.compile(rf"language_model.*\.layers\.[{LAYERS}-9]|vision_tower.*\.layers\.[1-9]")
    save_file({k: x for k, x in tensors.items() if not late.search(k)}, target / "model.safetensors")
    return target
