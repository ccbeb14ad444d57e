"""Steps of the rules of generated tokens, compiled for a TPU: what the compiler says about copies."""

import dataclasses

import jax.numpy as jnp
import pytest
from tpu import mesh_of

import vlcache_jax as vlc
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.registry import preset
from vlcache_jax.planning.programs import Programs, Workload

WORK = Workload(batch=8, prompt=8192, new_tokens=256, tiles=5)


@pytest.mark.parametrize(
    ("policy", "share"),
    [
        (vlc.H2O(0.1, decoding="evict"), 0.01),
        pytest.param(
            dataclasses.replace(vlc.VLCache(0.1), decoding=vlc.Recompress(128)), 0.12, marks=pytest.mark.thorough
        ),
    ],
    ids=["h2o", "recompress"],
)
def test_a_step_copies_no_state(policy, share):
    """Written at slots of their own for every row and head, and rewritten under a condition, yet in place.

    What recompression needs besides (0.11 GB beside 1.09 GB) are its scores, their ranking and a few
    chunks of keys.
    """
    programs = Programs(
        Llava(preset("llava-v1.6-mistral-7b"), jnp.dtype("bfloat16")), mesh_of("v6e:1x1", {"data": 1, "model": 1})
    )
    program, _ = programs.decode_step(WORK, policy)
    assert program.refused is None, program.refused
    state = programs.state(WORK, policy)
    stores = programs.bytes_of((state.context, state.tail, state.observed))
    assert program.alias_bytes >= 0.99 * stores
    assert program.temporary_bytes < share * stores, program.temporary_bytes / stores
