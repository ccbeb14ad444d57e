# Installs vlcache_jax into this runtime, once: from a clone, from a wheel beside this notebook, or from the package
# index. JAX stays as the runtime has it, unless it is too old for the library: then this says what to restart.
import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if importlib.util.find_spec("vlcache_jax") is None:
    clones = [path for path in (".", "..", "vlcache_jax") if (pathlib.Path(path) / "pyproject.toml").is_file()]
    wheels = sorted(map(str, pathlib.Path().glob("vlcache_jax-*.whl")))
    otherwise = "vlcache_jax"  # the package index
    source = clones[0] if clones else wheels[-1] if wheels else otherwise
    before, running = version("jax"), "jax" in sys.modules
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"vlcache_jax could not be installed from {source!r}: clone the repository and open this notebook from its "
            f"folder `colab`, or upload its wheel beside the notebook.\n{done.stderr}"
        )
    importlib.invalidate_caches()
    print("installed from", {".": "this folder", "..": "the clone around this folder"}.get(source, source))
    if before != version("jax"):
        print(f"JAX is {version('jax')} now{f', and was {before}' if before else ''}.", end=" ")
        print("On a TPU also run `%pip install -U 'jax[tpu]'`, on an NVIDIA GPU `%pip install -U 'jax[cuda12]'`.")
        if running:
            print("Now restart the session (Runtime > Restart session) and go on from the next cell.")
