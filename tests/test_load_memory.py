"""What loading holds in memory, as the operating system counts it, in a process of its own."""

import subprocess
import sys

import pytest
import torch
from tiny_checkpoints import make_tiny_llava

_CHILD = """
import sys
from pathlib import Path
import vlcache_jax as vlc

def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

vlc.load(sys.argv[1], layout=sys.argv[3])  # whatever the first call imports and starts
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = resident("VmRSS")
vlm = vlc.load(sys.argv[2], layout=sys.argv[3])
print(resident("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10, "num_attention_heads": 16}
    make_tiny_llava(folder / "small")
    make_tiny_llava(folder / "large", text=sizes, dtype=torch.bfloat16)
    return [folder / "small", folder / "large"]


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["stacked", "apart"])
def test_loading_holds_the_weights_once(folders, layout):
    """200 MB, on the CPU, where parameters lie in the host's memory: they, and a fifth at most for all else."""
    weights = (folders[1] / "model.safetensors").stat().st_size
    assert weights > 200e6
    command = [sys.executable, "-c", _CHILD, *map(str, folders), layout]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert weights <= peak <= 1.2 * weights, peak / weights
