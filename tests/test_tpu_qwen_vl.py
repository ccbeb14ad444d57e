"""The programs of Qwen-VL at the sizes of published models, compiled for a slice of v5e: kernels and memory."""

import jax.numpy as jnp
import pytest
from tpu import mesh_of

import vlcache_jax as vlc
from vlcache_jax.models.families.qwen_vl.model import QwenVL
from vlcache_jax.models.families.registry import preset
from vlcache_jax.planning.programs import Programs, Workload

WORK = Workload(batch=2, prompt=4096, new_tokens=256, tiles=5120)
BUDGET, MEMORY = 0.1, 15.75 * 2**30


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_prefill_and_decode_step(name):
    """The tower, deepstack and the compression are in the prefill; a step writes in place and takes the kernels."""
    config = preset(name)
    programs = Programs(QwenVL(config, jnp.bfloat16), mesh_of("v5e:2x4", {"data": 2, "model": 4}))
    prefill, _ = programs.prefill(WORK, vlc.VLCache(budget=BUDGET))
    step, _ = programs.decode_step(WORK, vlc.VLCache(budget=BUDGET))
    print(name, prefill, step, sep="\n")
    assert (prefill.refused, step.refused) == (None, None)
    weights = programs.bytes_of(programs.params)
    state = programs.state(WORK, vlc.VLCache(budget=BUDGET))
    stores = programs.bytes_of((state.context, state.tail))
    decoder = config.decoder  # a device has one row, and a quarter of the KV heads
    slots = decoder.num_layers * (BUDGET * WORK.prompt + WORK.new_tokens)
    of_all = 2 * 2 * slots * decoder.num_kv_heads // 4 * decoder.head_dim
    assert of_all <= stores <= 1.2 * of_all
    assert weights + stores <= step.peak_bytes <= weights + 1.2 * stores + 2**26
    assert prefill.peak_bytes <= weights + 3 * 2**30 <= MEMORY
    assert {"append=pallas_tpu", "decode_attention=pallas_tpu"} <= set(step.implementations)
    assert "column_statistics=pallas_tpu" in prefill.implementations
