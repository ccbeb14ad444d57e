"""The train step of adapters of LLaVA-1.5-7B on eight v5e chips: fits, fast kernels, what chips say, flops."""

import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from hlo import collectives
from jax.sharding import NamedSharding, PartitionSpec
from tpu import mesh_of

from vlcache_jax.inputs import Batch
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.registry import preset
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.planning.compiling import abstract, compile_on
from vlcache_jax.planning.placement import place, place_params
from vlcache_jax.training.batch import TrainBatch
from vlcache_jax.training.lora import Lora
from vlcache_jax.training.loss import answer_loss
from vlcache_jax.training.state import init_state, make_train_step

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import tpu_roofline

ROWS, LENGTH, CHIPS = 8, 1024, 8
AXES = {"data": 2, "fsdp": 2, "model": 2}


@cache
def model_7b():
    return Llava(preset("llava-1.5-7b"), jnp.dtype("bfloat16"), remat="projections")


@cache
def compiled():
    """(the step, shapes of the base, shapes of the adapters)."""
    model, mesh = model_7b(), mesh_of("v5e:2x4", AXES)
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), model.abstract_params())
    lora, optimizer = Lora(rank=16), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    adapters = jax.eval_shape(lambda: lora.init(model, base))
    places = param_shardings(adapters, mesh)
    state = jax.eval_shape(lambda adapters: init_state(adapters, optimizer), adapters)
    # The optimizer's numbers lie as their parameters do.
    like = dict(zip((x.shape for x in jax.tree.leaves(adapters)), jax.tree.leaves(places)))
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(lambda x: abstract(x, mesh, like.get(x.shape, whole)), state)
    side = model.config.vision.image_size
    ids, weights = (jax.ShapeDtypeStruct((ROWS, LENGTH), dtype) for dtype in (jnp.int32, jnp.float32))
    pixels = jax.ShapeDtypeStruct((ROWS, 1, side, side, 3), jnp.float32)
    prompts = Batch(ids, jax.ShapeDtypeStruct((ROWS,), jnp.int32), ids, pixels)
    batch = place(TrainBatch(prompts, ids, weights), mesh)
    step = make_train_step(lora.loss(answer_loss(model)), optimizer)
    return compile_on(mesh, step, state, batch, place_params(base, mesh), donate=(0,)), base, adapters


@pytest.mark.thorough
def test_it_fits_and_runs_the_fast_kernels():
    """16 GB a chip. Splash attention forward, once more where the backward pass needs it, and its two of that pass."""
    memory = compiled()[0].memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert used < 15.0 * 2**30, used / 2**30
    lines = compiled()[0].as_text().splitlines()
    in_layers = [x for x in lines if 'custom_call_target="tpu_custom_call"' in x and "/decoder/" in x]
    assert len(in_layers) == 4


@pytest.mark.thorough
def test_chips_gather_weights_and_sum_products():
    """In the decoder's layers: weights of bfloat16 gathered over "fsdp", sums of products over "model", and those of
    the adapters' gradients, which are a sixteenth of an activation; never an activation gathered, nor float32."""
    found = [x for x in collectives(compiled()[0].as_text()) if "/decoder" in x.place and x.depth]
    assert {x.kind for x in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathers = [x for x in found if x.kind == "all-gather"]
    assert gathers
    for x in gathers:
        assert "bf16" in x.shape, x
        assert "f32" not in x.shape, x
        assert f",{LENGTH},4096]" not in x.shape, x
    assert all("dot_general" in x.place for x in found if x.kind == "all-reduce")


def _kernel(name, operands):
    """(bytes, flops) of splash attention's kernels, which skip what is above the diagonal."""
    rows, heads, length, size = next(sizes for _, sizes, _ in operands if len(sizes) == 4)
    products = 4 if "dkv" in name else 3 if "dq" in name else 2
    return 0, products * rows * heads * length**2 * size


@pytest.mark.thorough
def test_flops_are_at_most_a_quarter_above_the_formulas():
    """Forward and backward of frozen weights are two products each, of adapters three; attention has seven."""
    step, base, adapters = compiled()
    c, v = model_7b().config.decoder, model_7b().config.vision
    tokens, patches = ROWS * LENGTH, ROWS * (v.grid_size**2 + 1)
    of_tower = {name: base[name] for name in ("vision", "projector")}
    least = 2 * patches * tpu_roofline.matrix_parameters(of_tower)
    least += 4 * patches**2 / ROWS * v.hidden_size * v.num_layers
    least += 2 * 2 * tokens * tpu_roofline.matrix_parameters(base["decoder"])
    least += 3 * 2 * tokens * sum(x.size for x in jax.tree.leaves(adapters))
    least += 7 * tokens * LENGTH * c.num_layers * c.num_heads * c.head_dim
    found = tpu_roofline.Costs(step.as_text(), _kernel).flops
    assert 0.95 < found * CHIPS / least < 1.25, found * CHIPS / least
