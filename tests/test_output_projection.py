"""What a score is given of the layer's output projection (`LayerInputs.output`), however its weights lie."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import cases
from tiny_models import tiny_llava

from vlcache_jax.models.coding import WeightCoding
from vlcache_jax.policies.methods import critical_kv
from vlcache_jax.policies.scores.attention import LayerInputs
from vlcache_jax.typing import WithOutput

MODEL, PARAMS = tiny_llava()
OF_LAYERS = PARAMS["decoder"]["layers"]["attention"]["output"]
WANTED = OF_LAYERS["kernel"].reshape(3, 4, 8, 32)  # [layers, heads, head_dim, hidden]


def outputs(model, params):
    def attend(query, key, value, carry, xs, output):
        return jnp.zeros_like(query), carry, output

    hidden, positions = jnp.ones((2, 3, 32)), jnp.broadcast_to(jnp.arange(3), (2, 3))
    return np.asarray(model.apply({"params": params}, hidden, positions, WithOutput(attend), method="decode")[2])


def with_output(**weights):
    decoder = PARAMS["decoder"]
    attention = decoder["layers"]["attention"] | {"output": weights}
    layers = decoder["layers"] | {"attention": attention}
    return PARAMS | {"decoder": decoder | {"layers": layers}}


def plain():
    return MODEL, PARAMS, WANTED


def adapted():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 32, 2), (3, 2, 32)))
    return MODEL, with_output(**OF_LAYERS, lora_a=a, lora_b=b), (OF_LAYERS["kernel"] + a @ b).reshape(WANTED.shape)


def apart():
    model = dataclasses.replace(MODEL, layout="apart")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), model.abstract_params())
    kernels = [params["decoder"][f"layers_{i}"]["attention"]["output"]["kernel"] for i in range(3)]
    return model, params, np.stack(kernels).reshape(WANTED.shape)


def coded():
    model = dataclasses.replace(MODEL, weights=WeightCoding(8))
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.dtype == jnp.int8:
            return rng.integers(-9, 9, leaf.shape).astype(np.int8)
        return rng.normal(size=leaf.shape).astype(leaf.dtype)

    params = jax.tree.map(draw, model.abstract_params())
    weights = params["decoder"]["layers"]["attention"]["output"]
    return model, params, (weights["codes"] * weights["scales"]).reshape(WANTED.shape)


@pytest.mark.parametrize("build", cases({x.__name__: x for x in (plain, adapted, apart, coded)}, ("plain",)))
def test_a_score_is_given_what_the_layer_multiplies_with(build):
    model, params, wanted = build()
    np.testing.assert_allclose(outputs(model, params), wanted, rtol=1e-5, atol=1e-6)


def test_projected_values_are_made_a_few_at_a_time(monkeypatch):
    """As many tokens as a bound on bytes allows: the same bits as all at once, and the formula's."""
    rng = np.random.default_rng(0)
    value, output = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 37, 2, 16), (6, 16, 128)))
    inputs = LayerInputs(
        query=value, key=value, value=value, output=output, layer=0, density=1, rows=4, lengths=[37, 20],
        vision_index=None,
    )  # fmt: skip
    found, loops = [], []
    for most in (2**26, 32 * 2 * 6 * 128 * 4, 1):
        monkeypatch.setattr(critical_kv, "_BYTES", most)
        run = jax.jit(lambda value: critical_kv.projected_norm(dataclasses.replace(inputs, value=value)))
        loops.append(run.lower(value).as_text().count("stablehlo.while"))
        found.append(np.asarray(run(value)))
    assert loops == [0, 1, 1]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    each = np.repeat(value.astype(np.float64), 3, axis=2)
    norms = np.abs(np.einsum("bthd,hdo->bhto", each, output)).sum(axis=-1)
    np.testing.assert_allclose(found[0], norms.reshape(2, 2, 3, 37).mean(axis=2), rtol=1e-5)
