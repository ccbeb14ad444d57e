"""The wheel that is built from the sdist holds every subpackage and the package data, and installs nothing else; the
notebook runs with it in an environment that holds nothing else."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import build  # noqa: F401  (the command below needs it; without it this file is left out by --core)
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_wheel(built):
    (wheel,) = built.glob("*.whl")
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


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["whl", "clone"])
def test_the_quickstart_in_an_empty_environment(built, tmp_path, kind):
    """Of the notebook's two ways to install: a wheel beside it, and a clone around it (here the unpacked sdist)."""
    if kind == "whl":
        folder = tmp_path
        shutil.copy(next(built.glob("*.whl")), folder)
    else:
        shutil.unpack_archive(next(built.glob("*.tar.gz")), tmp_path)
        folder = next(tmp_path.glob("vlcache_jax-*")) / "colab"
        folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "colab" / "quickstart.ipynb", folder)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "nbclient", "ipykernel"], check=True)
    clean = {key: x for key, x in os.environ.items() if not key.startswith(("XLA_", "PYTHON", "JAX_NUMPY"))}
    run = (
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(ROOT / 'colab')!r}); "
        f"import run_notebook; print(run_notebook.run_notebook('quickstart', Path({str(folder)!r})))"
    )
    done = subprocess.run([python, "-c", run], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    assert "vl_cache: salary 9338" in done.stdout
