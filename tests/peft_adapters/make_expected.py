"""Writes what lies beside it, with PEFT (0.21.2, which nothing else needs): python tests/peft_adapters/make_expected.py

modules.json         names of the modules that PEFT adapts, of each family
plain/, patterns/    adapters of a tiny LLaVA: all linear layers; some, with ranks and alphas of their own
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from tiny_checkpoints import make_tiny_llava  # noqa: E402
from tiny_families import TINY  # noqa: E402
from tiny_gemma3 import make_tiny_gemma3  # noqa: E402
from tiny_qwen import make_tiny_qwen  # noqa: E402

FAMILIES = {name: tiny.make for name, tiny in TINY.items()} | {"llava": make_tiny_llava, "gemma3": make_tiny_gemma3}
FAMILIES |= {
    kind: lambda folder, kind=kind: make_tiny_qwen(folder, kind) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
}
SETTINGS = {
    "plain": LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"),
    "patterns": LoraConfig(
        r=2,
        lora_alpha=4,
        use_rslora=True,
        target_modules=["q_proj", "down_proj", "linear_1"],
        layers_to_transform=[0, 2],
        rank_pattern={"down_proj": 3},
        alpha_pattern={"language_model.layers.0.self_attn.q_proj": 8},
    ),
}


def saved(model, config, folder):
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return adapted


modules = {}
for family, make in FAMILIES.items():
    with tempfile.TemporaryDirectory() as folder:
        adapted = saved(make(Path(folder)), SETTINGS["plain"], Path(folder) / "adapters")
        names = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
        modules[family] = sorted({re.sub(r"\.\d+(?=\.)", ".{layer}", name) for name in names})
(HERE / "modules.json").write_text(json.dumps(modules, indent=1) + "\n")
for name, config in SETTINGS.items():
    with tempfile.TemporaryDirectory() as folder:
        saved(make_tiny_llava(Path(folder)), config, HERE / name)
        (HERE / name / "README.md").unlink()
