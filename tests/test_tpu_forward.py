"""A model's `forward` and a train step on several chips, compiled for TPUs: kernels, copies and collectives."""

from functools import cache

import jax
import jax.numpy as jnp
import optax
import pytest
from hlo import collectives
from jax.sharding import AxisType, Mesh
from tpu import chip_llava, mesh_of

from vlcache_jax.inputs import Batch
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.planning.compiling import abstract, compile_on
from vlcache_jax.planning.placement import place
from vlcache_jax.training.batch import TrainBatch
from vlcache_jax.training.loss import answer_loss
from vlcache_jax.training.state import init_state, make_train_step

ROWS, LENGTH, TILES = 8, 256, 1

_model = cache(chip_llava)


def _placed(topology, axes, kind=AxisType.Auto):
    """(mesh, abstract parameters, abstract train batch)."""
    mesh = mesh_of(topology, axes)
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(kind,) * len(axes))
    shapes = _model().abstract_params()
    params = abstract(shapes, mesh, param_shardings(shapes, mesh))
    side = _model().config.vision.image_size
    whole, weights = (jax.ShapeDtypeStruct((ROWS, LENGTH), dtype) for dtype in (jnp.int32, jnp.float32))
    pixels = jax.ShapeDtypeStruct((ROWS, TILES, side, side, 3), jnp.float32)
    batch = Batch(whole, jax.ShapeDtypeStruct((ROWS,), jnp.int32), whole, pixels)
    return mesh, params, place(TrainBatch(batch, whole, weights, whole, whole), mesh)


def _check_forward(topology, axes, kind=AxisType.Auto):
    """With its gradients. Attention talks to no other chip, in the decoder or the vision tower."""
    mesh, params, batch = _placed(topology, axes, kind)

    def gradients(params, batch):
        return jax.grad(lambda params: jnp.mean(_model().apply({"params": params}, batch, method="forward")))(params)

    compiled = compile_on(mesh, gradients, params, batch.batch)
    calls = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert len(calls) == 3  # splash attention: forward, and its two kernels for the backward pass
    _check_collectives(compiled)


def _check_train_step(topology, axes, kind=AxisType.Auto):
    mesh, params, batch = _placed(topology, axes, kind)
    optimizer = optax.sgd(0.1)
    step = make_train_step(answer_loss(_model()), optimizer)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    state = state._replace(params=params, step=abstract(state.step, mesh))
    _check_collectives(compile_on(mesh, step, state, batch, donate=(0,)))


def _check_collectives(compiled):
    """Within the layers only projections are summed, forward and backward, and the gradients of their parameters."""
    of_layers = [x for x in collectives(compiled.as_text()) if "/layers/" in x.place]
    assert of_layers
    for found in of_layers:
        assert found.kind == "all-reduce", found
        backward = "transpose(" in found.place  # of parameters, over the data axes: a bias' comes first in its tuple
        assert found.place.endswith(("dot_general", "reduce_sum") if backward else "dot_general"), found


@pytest.mark.thorough
def test_forward_and_its_gradients_on_four_chips():
    """Mosaic kernels cannot be partitioned by the compiler: this compiles only if every chip runs its own."""
    _check_forward("v5e:2x2", {"data": 2, "model": 2}, AxisType.Explicit)


@pytest.mark.thorough
def test_train_step_on_four_chips():
    _check_train_step("v5e:2x2", {"data": 2, "model": 2})
