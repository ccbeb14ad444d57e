"""The programs of llava-v1.6-mistral-7b, compiled for TPUs: what the compiler says about copies and memory."""

import jax.numpy as jnp
import pytest
from tpu import mesh_of

import vlcache_jax as vlc
from vlcache_jax.models.llava import Llava
from vlcache_jax.models.presets import preset
from vlcache_jax.planning.programs import Programs, Workload

WORK = Workload(batch=8, prompt=8192, new_tokens=256, tiles=5)


def _programs(topology, **axes):
    mesh = mesh_of(topology, {"data": 1, "model": 1} | axes)
    return Programs(Llava(preset("llava-v1.6-mistral-7b"), jnp.dtype("bfloat16")), mesh)


@pytest.mark.parametrize(("topology", "share"), [("v6e:1x1", 0.02), ("v5p:1x1x1", 0.031)])
def test_decode_step_copies_nothing(topology, share):
    """The donated state is aliased as a whole; what a step needs besides is a few percent of it.

    On v5p it is the query projection of one layer (34 MB), which the compiler transposes: weights, not state.
    """
    programs = _programs(topology)
    policy = vlc.VLCache(budget=0.1)
    program, _ = programs.decode_step(WORK, policy)
    assert program.refused is None
    state = programs.state(WORK, policy)
    stores = programs.bytes_of((state.context, state.tail))
    assert program.alias_bytes >= stores
    assert program.temporary_bytes < share * stores


def test_decode_step_over_8_bits_copies_nothing():
    """As above; the codes are unpacked block by block inside the kernel."""
    programs = _programs("v6e:1x1")
    policy = vlc.VLCache(budget=0.1, bits=8)
    program, _ = programs.decode_step(WORK, policy)
    assert program.refused is None
    state = programs.state(WORK, policy)
    stores = programs.bytes_of((state.context, state.tail))
    assert program.alias_bytes >= stores
    assert program.temporary_bytes < 0.05 * stores
