"""`import vlcache_jax` is quick, and its names are all there at the first use of one."""

import subprocess
import sys


def test_importing_the_package_does_not_import_jax():
    code = """
import sys
import vlcache_jax
assert vlcache_jax.__version__
assert not {"jax", "numpy", "PIL"} & set(sys.modules)
from vlcache_jax import generate
assert "jax" in sys.modules
import vlcache_jax.inference.prefill
from vlcache_jax import *
assert generate is vlcache_jax.generate is vlcache_jax.public.generate
assert set(vlcache_jax.__all__) < set(dir(vlcache_jax)) & set(globals())
assert not hasattr(vlcache_jax, "generat")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_module_can_be_imported_before_the_names():
    """`from vlcache_jax import ops`, inside a module, must not import everything else first: that is a circle."""
    subprocess.run(
        [sys.executable, "-c", "import vlcache_jax.inference.decode_step, vlcache_jax.inference.generate"],
        check=True,
        timeout=120,
    )
