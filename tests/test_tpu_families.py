"""The programs of every kind of family, compiled for v5e at the sizes of published models: kernels, loops, memory."""

import jax.numpy as jnp
import pytest
from hlo import loops
from tiers import cases
from tpu import mesh_of

import vlcache_jax as vlc
from vlcache_jax.models.families.registry import family_of, preset
from vlcache_jax.planning.programs import Programs, Workload

BUDGET, MEMORY = 0.1, 15.75 * 2**30
ONE, EIGHT = ("v5e:1x1", {"data": 1, "model": 1}), ("v5e:2x4", {"data": 2, "model": 4})
SLICES = {
    "gemma-3-4b-it": ONE,
    "internvl3-2b": ONE,
    "qwen3-vl-4b": ONE,
    "llava-onevision-qwen2-7b-ov": EIGHT,
    "qwen2.5-vl-7b": EIGHT,
    "qwen3-vl-8b": EIGHT,
}


@pytest.mark.parametrize("name", cases({name: name for name in SLICES}, []))
def test_prefill_and_decode_step(name):
    """The tower and the compression are in the prefill; a step writes in place; both take the kernels."""
    topology, axes = SLICES[name]
    config = preset(name)
    family = family_of(config)
    work = Workload(batch=axes["data"], prompt=4096, new_tokens=256, tiles=family.image_tiles(config))
    programs = Programs(family.model(config, jnp.dtype("bfloat16")), mesh_of(topology, axes))
    prefill, whole = programs.prefill(work, vlc.VLCache(budget=BUDGET))
    step, one = programs.decode_step(work, vlc.VLCache(budget=BUDGET))
    print(name, prefill, step, sep="\n")
    assert (prefill.refused, step.refused) == (None, None)

    weights = programs.bytes_of(programs.params)
    state = programs.state(work, vlc.VLCache(budget=BUDGET))
    stores = programs.bytes_of((state.context, state.tail))
    spec = programs.model.spec  # a device has one row, and its share of the KV heads
    slots = sum(BUDGET * work.prompt if window is None else window for window in spec.layer_windows)
    slots += spec.num_layers * work.new_tokens
    of_all = 2 * 2 * slots * spec.num_kv_heads // axes["model"] * spec.head_dim
    assert of_all <= stores <= 1.2 * of_all
    assert step.alias_bytes >= stores
    assert weights + stores <= step.peak_bytes <= weights + 1.2 * stores + 2**26
    assert prefill.peak_bytes <= weights + 3 * 2**30 <= MEMORY

    assert step.implementations == ("append=pallas_tpu", "decode_attention=pallas_tpu")
    assert prefill.implementations == ("attention=splash_tpu", "column_statistics=pallas_tpu")
    assert [loop.place.split("/")[-2] for loop in loops(one.as_text())] == ["decoder"]
    # Layers of the tower and of the decoder, which search by value for the tokens that they hand on; behind them four
    # such searches, for the budgets and the best tokens.
    found = [(loop.place.split("/")[-2], loop.depth) for loop in loops(whole.as_text())]
    print(found)
    assert [place for place, depth in found if depth == 0][:2] == ["vision", "decoder"]
    assert (sum(depth == 0 for _, depth in found), sum(depth > 0 for _, depth in found)) == (6, 2)
