"""TPU slices that are only described, and programs compiled for them."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import PartitionSpec as P
from tpu import TOPOLOGIES, compile_for, mesh_of, shape

from vlcache_jax.errors import InputError
from vlcache_jax.files.compilation_cache import use_compilation_cache
from vlcache_jax.planning.chips import CHIPS
from vlcache_jax.planning.topologies import make_mesh, parse_topology, tpu_devices


@pytest.mark.parametrize(
    "topology", [*TOPOLOGIES, "v6e:1x1", "v5e:1x4", "v5e:2x4", "v5p:4x4x4", "v5p:2x2", "tpu7x:2x2x1"]
)
def test_devices(topology):
    chip, sizes = parse_topology(topology)
    devices = tpu_devices(topology)
    assert len(devices) == CHIPS[chip].devices * int(jnp.prod(jnp.array(sizes)))
    assert {d.platform for d in devices} == {"tpu"}


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5x:2x2", "use one of v5"),
        ("v6:2x2", "use one of v6e"),
        ("v5e", "as in v5e:2x2"),
        ("v5e:2by4", "as in v5e:2x2"),
        ("v5e:0x4", "as in v5e:2x2"),
        ("v5e:2x2x2", "chips along its 2 axes"),
        ("v5e:3x5", "even numbers"),
    ],
)
def test_wrong_topology(topology, message):
    with pytest.raises(InputError, match=message):
        tpu_devices(topology)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jax\[tpu\]'"):
        tpu_devices("v5e:2x2")


def test_mesh_too_large():
    with pytest.raises(InputError, match="a mesh of 8 devices"):
        make_mesh(tpu_devices("v5e:2x2"), {"model": 8})


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_memory_of_a_known_program(topology):
    compiled = compile_for(topology, lambda x, y: (x + y, y), shape(1024, 512), shape(1024, 512), donate=(0,))
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == 2 * 1024 * 512 * 2
    assert memory.alias_size_in_bytes == 1024 * 512 * 2
    assert jax.devices()[0].platform == "cpu"  # no TPU backend was started


def test_sharded():
    compiled = compile_for(
        "v5e:2x2",
        jnp.matmul,
        shape(256, 512),
        shape(512, 256),
        axes={"model": 4},
        shardings=[P(None, "model"), P("model")],
    )
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 256 * 512 * 2 // 4
    assert "all-reduce" in compiled.as_text() or "reduce-scatter" in compiled.as_text()
    assert mesh_of("v5e:2x2").size == 1


def test_programs_that_are_kept(tmp_path):
    """JAX's persistent cache keeps a TPU's program, but cannot read it back here: compiled anew, without a warning."""
    names = "compilation_cache_dir persistent_cache_min_compile_time_secs persistent_cache_min_entry_size_bytes"
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names.split()}
    use_compilation_cache(tmp_path)
    try:
        for _ in range(2):  # the second of the same program would be read
            compile_for("v6e:2x2", lambda x: x + 1, shape(8, 128))
        assert any(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()
