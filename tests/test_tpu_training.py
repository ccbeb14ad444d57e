"""The train step of adapters of LLaVA-1.5-7B on eight v5e chips: fits, fast kernels, what chips say, flops."""

import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from hlo import collectives
from tpu import TOPOLOGIES  # noqa: F401  (the file is left out where there is no compiler for TPUs)

from vlcache_jax.errors import InputError
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.registry import preset
from vlcache_jax.planning.training import plan_training
from vlcache_jax.training.lora import Lora

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import tpu_roofline

ROWS, LENGTH, CHIPS = 8, 1024, 8
AXES = {"data": 2, "fsdp": 2, "model": 2}


@cache
def model_7b():
    return Llava(preset("llava-1.5-7b"), jnp.dtype("bfloat16"), remat="projections")


@cache
def planned():
    """(the plan, the compiled step)."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    return plan_training(
        model_7b(), "v5e:2x4", AXES, batch=ROWS, length=LENGTH, lora=Lora(rank=16), optimizer=optimizer
    )


@pytest.mark.thorough
def test_it_fits_and_runs_the_fast_kernels():
    """16 GB a chip. Splash attention forward, once more where the backward pass needs it, and its two of that pass."""
    plan, compiled = planned()
    assert plan.fits, plan
    assert plan.frozen_bytes < 7.1e9 * 2 / 3.5  # a quarter, and what no axis divides
    # Adapters and their two moments in float32; the side that a kernel splits is halved, the other one whole.
    numbers = 4 * (4096 + 4096 / 2) + 3 * (4096 + 11008 / 2)
    assert plan.state_bytes == pytest.approx(3 * 4 * 32 * 16 * numbers, rel=1e-3)
    lines = compiled.as_text().splitlines()
    assert sum('custom_call_target="tpu_custom_call"' in line for line in lines) == 4


@pytest.mark.thorough
def test_chips_gather_weights_and_sum_products():
    """In the decoder's layers: weights of bfloat16 gathered over "fsdp", sums of products over "model", and those of
    the adapters' gradients, which are a sixteenth of an activation; never an activation gathered, nor float32."""
    found = [x for x in collectives(planned()[1].as_text()) if "/decoder" in x.place and x.depth]
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
    base, c, v = model_7b().abstract_params(), model_7b().config.decoder, model_7b().config.vision
    adapters = jax.eval_shape(lambda: Lora(rank=16).init(model_7b(), base))
    tokens, patches = ROWS * LENGTH, ROWS * (v.grid_size**2 + 1)
    of_tower = {name: base[name] for name in ("vision", "projector")}
    least = 2 * patches * tpu_roofline.matrix_parameters(of_tower)
    least += 4 * patches**2 / ROWS * v.hidden_size * v.num_layers
    least += 2 * 2 * tokens * tpu_roofline.matrix_parameters(base["decoder"])
    least += 3 * 2 * tokens * sum(x.size for x in jax.tree.leaves(adapters))
    least += 7 * tokens * LENGTH * c.num_layers * c.num_heads * c.head_dim
    found = tpu_roofline.Costs(planned()[1].as_text(), _kernel).flops
    assert 0.95 < found * CHIPS / least < 1.25, found * CHIPS / least


def test_axes_that_are_not_the_slice():
    with pytest.raises(InputError, match="does not make up the 8 devices of v5e:2x4"):
        plan_training(model_7b(), "v5e:2x4", {"fsdp": 4}, batch=ROWS, length=LENGTH)
