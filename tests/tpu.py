"""Compiling for real TPUs inside the tests, where no TPU is attached.

    compiled = compile_for("v5e:2x2", kernel, jax.ShapeDtypeStruct((8, 128), "bfloat16"))
    compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["bytes accessed"], compiled.as_text()

Files that import this module are left out where libtpu is not published (see conftest.py). Shapes suffice as
arguments; nothing runs. Works under pytest-xdist.
"""

from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.vision.config import VisionConfig
from vlcache_jax.planning.compiling import abstract, compile_on
from vlcache_jax.planning.topologies import make_mesh, tpu_devices

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
"""One slice of every generation."""

_devices = cache(tpu_devices)


def mesh_of(topology, axes=None):
    """A mesh over a slice; of its first device only, unless `axes` ({"model": 4}) says otherwise."""
    return make_mesh(_devices(topology), axes or {"model": 1})


def compile_for(topology, function, *args, donate=(), shardings=None, axes=None):
    """Compiles `function(*args)` for a TPU.

    Args:
      topology: such as "v5e:2x4" (2x4 chips), "v6e:1x1" or "v5p:2x2x1".
      function: traceable; bind static arguments with `functools.partial`.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
      donate: numbers of donated arguments.
      shardings: one PartitionSpec (or pytree of them, or prefix of it) for each argument; replicated by default.
      axes: of the mesh, {"model": 8}; one device by default.

    Returns:
      The compiled program.
    """
    mesh = mesh_of(topology, axes)
    shardings = [PartitionSpec()] * len(args) if shardings is None else shardings
    placed = [abstract(arg, mesh, spec) for arg, spec in zip(args, shardings, strict=True)]
    return compile_on(mesh, function, *placed, donate=donate)


def temporaries(compiled):
    """Bytes of a program's temporary memory on one device."""
    return compiled.memory_analysis().temp_size_in_bytes


def shape(*sizes, dtype="bfloat16"):
    """An abstract array."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def chip_llava(kv_heads=8):
    """A LLaVA with heads as wide as a 7B's, whose programs compile in seconds."""
    vision = VisionConfig(
        hidden_size=256, intermediate_size=512, num_layers=2, num_heads=8, image_size=56, patch_size=14
    )
    decoder = DecoderConfig(
        family="llama", vocab_size=512, hidden_size=1024, intermediate_size=2048, num_layers=2, num_heads=8,
        num_kv_heads=kv_heads, head_dim=128, max_positions=1024,
    )  # fmt: skip
    config = LlavaConfig(model_type="llava", vision=vision, decoder=decoder, image_token_id=5, feature_layers=(2,))
    return Llava(config, jnp.dtype("bfloat16"))
