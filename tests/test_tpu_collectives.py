"""What chips say to each other, counted in programs compiled for v5e:2x4 over meshes of four forms."""

import math
import re
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import optax
import pytest
from hlo import collectives
from tpu import chip_llava, mesh_of

import vlcache_jax as vlc
from vlcache_jax.inputs import Batch
from vlcache_jax.parallel.replication import replicated
from vlcache_jax.planning.compiling import abstract, compile_on
from vlcache_jax.planning.placement import place, place_params
from vlcache_jax.training.batch import TrainBatch
from vlcache_jax.training.loss import answer_loss
from vlcache_jax.training.state import init_state, make_train_step

ROWS, LENGTH = 8, 256
SHAPES = [(8, 1), (4, 2), (2, 4), (1, 8)]  # data, model


@cache
def model():
    return chip_llava()


def forward(params, batch):
    return model().apply({"params": params}, batch, method="forward")


def generate(params, batch):
    return vlc.generate(model(), params, batch, vlc.VLCache(0.3), 8, eos_token_ids=[]).tokens


def compiled(data, over_model, function):
    mesh = mesh_of("v5e:2x4", {"data": data, "model": over_model})
    params, side = place_params(model().abstract_params(), mesh), model().config.vision.image_size
    whole, weights = (jax.ShapeDtypeStruct((ROWS, LENGTH), dtype) for dtype in (jnp.int32, jnp.float32))
    pixels = jax.ShapeDtypeStruct((ROWS, 1, side, side, 3), jnp.float32)
    batch = Batch(whole, jax.ShapeDtypeStruct((ROWS,), jnp.int32), whole, pixels)
    if function != "train":
        return compile_on(mesh, function, params, place(batch, mesh))
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    state = state._replace(params=params, step=abstract(state.step, mesh))
    batch = place(TrainBatch(batch, whole, weights, whole, whole), mesh)
    return compile_on(mesh, make_train_step(answer_loss(model()), optimizer), state, batch, donate=(0,))


def numbers(found):
    """In the largest of its results."""
    return max((math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"\[([\d,]+)\]", found.shape)), default=1)


def check(data, over_model, function, **of_layers):
    """Sums at projections only, two for each layer of the decoder and the tower, and no gather of anything large."""
    found = collectives(compiled(data, over_model, function).as_text())
    for x in found:
        assert x.kind == "all-reduce" or numbers(x) <= 8 * ROWS * LENGTH, x  # as many numbers as tokens, not as states
    layers = [x for x in found if "/layers/" in x.place]
    sums = Counter(x.place.split("/layers/")[-1] for x in layers if numbers(x) > ROWS)
    expected = {f"{name.replace('_', '/')}/dot_general": count for name, count in of_layers.items()}
    # Over the data axis all gradients of a layer are one sum, named after its first part: a weight, or a bias.
    gradients = {"attention/key/dot_general": 1, "attention/key/reduce_sum": 1}
    over_data = gradients if function == "train" and data > 1 else {}
    assert sums == (expected if over_model > 1 else {}) | over_data, found
    # One number a row: VL-Cache's density of a layer is a mean over all heads.
    few = [x for x in layers if numbers(x) <= ROWS]
    assert len(few) <= (function is generate and over_model > 1), few


FORWARD = {"attention_output": 2, "mlp_down": 1, "mlp_fc2": 1}
PREFILL_AND_STEP = {"attention_output": 3, "mlp_down": 2, "mlp_fc2": 1}
BACKWARD = {"attention_value": 2, "mlp_up": 1, "mlp_fc1": 1}  # of three products that widen the sums are one


def test_generate():
    check(2, 4, generate, **PREFILL_AND_STEP)


@pytest.mark.thorough
@pytest.mark.parametrize(("data", "over_model"), SHAPES)
def test_other_meshes(data, over_model):
    check(data, over_model, forward, **FORWARD)
    check(data, over_model, "train", **FORWARD, **BACKWARD)
    if (data, over_model) != (2, 4):
        check(data, over_model, generate, **PREFILL_AND_STEP)


def test_kv_heads_that_do_not_divide_are_reported():
    mesh = mesh_of("v5e:2x4", {"data": 1, "model": 8})
    notes = replicated(mesh.shape, chip_llava(kv_heads=2).spec, rows=ROWS)
    assert len(notes) == 1
    assert notes[0].startswith("2 KV heads do not divide over the 8 devices of axis 'model'")
