"""The built wheel holds every subpackage and the package data, and installs nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import build  # noqa: F401  (the command below needs it; without it this file is left out by --core)

ROOT = Path(__file__).parent.parent


def test_wheel(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = set()
    for folder, inside in (("vlcache_jax", ""), ("models", "models/"), ("kernels", "kernels/")):
        for path in (ROOT / folder).rglob("*.py"):
            expected.add(f"vlcache_jax/{inside}{path.relative_to(ROOT / folder).as_posix()}")
    assets = {
        f"vlcache_jax/{p.relative_to(ROOT / 'vlcache_jax').as_posix()}"
        for p in (ROOT / "vlcache_jax" / "assets").rglob("*")
        if p.is_file()
    }
    assert assets, "the demo's checkpoint and images ship with the package"
    assert names == expected | assets | {"vlcache_jax/py.typed"}
