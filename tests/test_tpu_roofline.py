"""The roofline's sums, of a program whose bytes and flops are known: a loop over stacked weights."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tpu import compile_for, mesh_of, shape

import vlcache_jax as vlc
from vlcache_jax.models.coding import weight_coding
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.registry import preset
from vlcache_jax.planning.programs import Programs, Workload

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import tpu_roofline


def costs(function, *args):
    return tpu_roofline.Costs(compile_for("v5e:2x2", function, *args).as_text(), None)


def test_a_loop_counts_as_often_as_it_runs_and_reads_a_slice_each_time():
    layers, width = 6, 2048
    weights = shape(layers, width, width)

    def run(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    found = costs(run, weights, shape(16, width))
    assert found.flops == 2 * 16 * width**2 * layers
    assert found.bytes == pytest.approx(layers * width**2 * 2, rel=0.05)


def test_batched_products():
    images, tokens, heads, size = 8, 577, 16, 64

    def run(q, k):
        return jnp.einsum("bthd,bshd->bhts", q, k)

    found = costs(run, *[shape(images, tokens, heads, size)] * 2)
    assert found.flops == 2 * images * heads * tokens**2 * size


@pytest.mark.thorough
@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4.25)])
def test_a_decode_step_of_coded_weights_reads_them_once_as_codes(weights, bits):
    """LLaVA-1.5-7B on one chip: projections of so many bits a weight, scales included; the head; the cache."""
    config = preset("llava-1.5-7b")
    model = Llava(config, jnp.dtype("bfloat16"), weights=weight_coding(weights))
    programs = Programs(model, mesh_of("v5e:2x2", {"data": 1, "model": 1}))
    work = Workload(batch=1, prompt=1024, new_tokens=128, tiles=0)
    _, compiled = programs.decode_step(work, vlc.VLCache(0.1))
    found = tpu_roofline.Costs(compiled.as_text(), partial(tpu_roofline.kernel_costs, 32))
    state = programs.state(work, vlc.VLCache(0.1))
    cache = programs.bytes_of([(store.keys, store.values) for store in (*state.stores, state.tail)])
    projections = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    least = projections * bits / 8 + 2 * 32_064 * 4096 + cache
    # XLA keeps the answer's part in fast memory, as it is so small: it goes there and back once more. And it copies the
    # scales of down projections, whose 86 groups fill no tiles.
    assert found.bytes < 1.06 * least, (found.bytes, least, found.by_place.most_common(8))
