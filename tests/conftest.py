"""Eight fake CPU devices, so that sharding is tested everywhere; and the option to leave torch out.

The tests also need the TPU's compiler (libtpu), but never a TPU: the settings below keep JAX from starting one, and let
several processes load the compiler at once. They must be there before JAX is imported.
"""

import collections
import functools
import gc
import os
import platform
import re
import sys
import zlib
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Users may set both; nothing here or in the library may lean on an implicit change of dtype or rank.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Tests compile far longer than they run. LLVM's optimisations are left out, and so, where JAX still has the older ones
# (0.10), are the fusion emitters in MLIR, which take two thirds of the compile time. Later JAX tests with them. A
# program is one module of LLVM's: to split it into many is for machines with cores to spare.
# With `--users-compiler` programs are compiled as users compile them; CI runs the promises about bits like that.
_QUICK_COMPILER = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)

gc.set_threshold(100_000, 20, 50)  # the default spends an eighth of the time on what tracing leaves

_NEEDS_REFERENCE = re.compile(r"^\s*(import|from) (torch|transformers|build|jupytext)\b", re.MULTILINE)
_HELPERS = re.compile(r"^\s*(?:import|from) (\w+)\b", re.MULTILINE)  # of which some lie in this folder
_NEEDS_TPU_COMPILER = re.compile(r"^(import|from) tpu\b", re.MULTILINE)
_HAS_TPU_COMPILER = sys.platform == "linux" and platform.machine() == "x86_64"  # where libtpu is published


# These compile whole models for TPUs, for minutes.
_WHOLE_MODELS = ("test_tpu_programs.py", "test_tpu_families.py", "test_tpu_generated.py")
# The files that take longest, both tiers together: started first, they leave no worker alone at the end.
_FIRST = [
    f"test_{name}.py"
    for name in (
        "pruning", "promises", "tpu_programs", "settings", "tpu_collectives", "mesh_types", "benchmarks",
        "docs_examples", "tpu_decode_attention", "processes", "quantised_stores", "tpu_pruning", "study",
        "tpu_generated", "demo_model", "planning", "tpu_forward", "tpu_settings", "tpu_attention",
    )
]  # fmt: skip


def pytest_addoption(parser):
    """`--core`: leave out the files that compare with torch and transformers or compile whole models for TPUs."""
    parser.addoption("--every", type=int, default=1, help="of the cases of a test only every so-manieth")
    parser.addoption("--share", type=int, default=1, help="only every so-manieth thorough test; with --core, of all")
    parser.addoption("--turn", type=int, default=0, help="which ones these two options take: another number, others")
    parser.addoption("--core", action="store_true", help="leave out what needs torch, transformers or much time")
    parser.addoption("--users-compiler", action="store_true", help="compile with XLA's default settings, slowly")


def pytest_configure(config):
    """Before any test file imports JAX; also in each of xdist's workers."""
    assert "jax" not in sys.modules
    flags = "" if config.getoption("--users-compiler") else _QUICK_COMPILER
    own = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{own} --xla_force_host_platform_device_count=8 {flags}"


@functools.cache
def _needs_reference(path: Path) -> bool:
    """Whether a file imports torch, transformers, build or jupytext, itself or through helpers beside it."""
    text = path.read_text(encoding="utf-8")
    helpers = (path.with_name(f"{name}.py") for name in set(_HELPERS.findall(text)))
    return bool(_NEEDS_REFERENCE.search(text)) or any(h.is_file() and _needs_reference(h) for h in helpers)


def pytest_ignore_collect(collection_path: Path, config):
    """See `pytest_addoption`; and files that compile for TPUs are left out where libtpu does not exist."""
    if collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    if config.getoption("--core") and (collection_path.name in _WHOLE_MODELS or _needs_reference(collection_path)):
        return True
    return True if not _HAS_TPU_COMPILER and _NEEDS_TPU_COMPILER.search(text) else None


def pytest_collection_modifyitems(config, items):
    """The longest files first; of many cases only a share, where one is asked for (`pytest_addoption`)."""
    turn, share, core = (config.getoption(f"--{name}") for name in ("turn", "share", "core"))
    left_out = _but_every(items, config.getoption("--every"), turn)
    rest = [item for item in items if item not in left_out and (core or item.get_closest_marker("thorough"))]
    left_out |= {item for i, item in enumerate(rest) if (i + turn) % share}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: _FIRST.index(item.path.name) if item.path.name in _FIRST else len(_FIRST))


def _but_every(items, every, turn):
    """The cases that `--every` leaves out: of a test with at least so many all but each Nth, from its name's on."""
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    many = {name: of_test for name, of_test in cases.items() if len(of_test) >= every}
    return {
        item
        for name, of_test in many.items()
        for i, item in enumerate(of_test)
        if (i + turn - zlib.crc32(name.encode())) % every
    }


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of several workers, each runs whole files: what a file's tests share is then compiled only once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


_MAPS = Path("/proc/self/maps")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A test begins without the compilation cache that a command called before it may have switched on.

    Every compiled program takes memory mappings, of which Linux allows a process 65,530: frees them in time.

    Before a test rather than after it: no fixture holds anything then, and nothing is patched. Counting them takes
    longer than many a test, so it is done once in a while.
    """
    if "jax" in sys.modules and sys.modules["jax"].config.jax_compilation_cache_dir:
        from jax.experimental.compilation_cache.compilation_cache import reset_cache

        sys.modules["jax"].config.update("jax_compilation_cache_dir", None)
        reset_cache()
    item.session.tests_started = getattr(item.session, "tests_started", 0) + 1
    if item.session.tests_started % 8 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 25_000:
        import jax

        jax.clear_caches()
        gc.collect()
