"""Loading weights as codes: what is coded, how, on every layout and mesh, and what it does to answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cut_demo import cut_demo
from flax import traverse_util
from jax.sharding import AxisType

import vlcache_jax as vlc
from vlcache_jax.models.io.coding_weights import Coder
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.training import Lora, init_state, make_train_step, merge, split

CODINGS = {"int8": vlc.WeightCoding(8), "int4": vlc.WeightCoding(4, 128)}


def flat(vlm):
    return traverse_util.flatten_dict(vlm.params, sep="/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cut_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def floats(folder):
    return vlc.load(folder, "float32", layout="stacked")


@pytest.fixture(scope="module")
def coded(folder):
    return {name: vlc.load(folder, "float32", layout="stacked", weights=name) for name in CODINGS}


@pytest.fixture(scope="module")
def batch(floats):
    return floats.processor(images=[[], []], text=["serial number total of 4 and 5", "4 and 5"])


def answers(vlm, batch, **options):
    return np.asarray(vlc.generate(vlm.model, vlm.params, batch, vlc.FullCache(), max_new_tokens=4, **options).tokens)


@pytest.mark.parametrize("name", CODINGS)
def test_projections_are_rounded_to_the_steps_of_their_groups_and_nothing_else_is_touched(name, floats, coded):
    before, after = flat(floats), flat(coded[name])
    bits, size = CODINGS[name].bits, CODINGS[name].group
    kernels = {path for path in before if path.startswith("decoder/layers/") and path.endswith("/kernel")}
    assert len(kernels) == 7
    for path in before.keys() - kernels:
        np.testing.assert_array_equal(after.pop(path), before[path])
    for path in kernels:
        codes, scales = (after.pop(path.replace("/kernel", f"/{kind}")) for kind in ("codes", "scales"))
        assert (codes.dtype, scales.dtype) == (f"int{bits}", "float32")
        kernel = np.asarray(before[path])
        layers, channels, features = kernel.shape
        group = {None: channels, 128: 128 if channels % 128 == 0 else 64}[size]
        parts = kernel.reshape(layers, channels // group, group, features)
        step = 2 * np.abs(parts).max(axis=2) / (2**bits - 1)
        np.testing.assert_allclose(scales, step, rtol=1e-6)
        back = np.asarray(codes.astype("float32")).reshape(parts.shape) * np.asarray(scales)[:, :, None]
        assert (np.abs(back - parts) <= 0.501 * step[:, :, None]).all()
    assert not after


@pytest.mark.parametrize("name", CODINGS)
def test_layouts_hold_the_same_codes_and_answer_alike(name, folder, coded, batch):
    stacked, apart = coded[name], vlc.load(folder, "float32", layout="apart", weights=name)
    assert "query_key_value" in apart.params["decoder"]["layers_0"]["attention"]
    jax.tree.map(np.testing.assert_array_equal, apart.with_layout("stacked").params, stacked.params)
    np.testing.assert_array_equal(answers(apart, batch), answers(stacked, batch))


@pytest.mark.parametrize("name", CODINGS)
def test_a_mesh_holds_the_same_codes_split_and_answers_alike(name, folder, coded, batch):
    """Groups of 128 of 512 channels split over two devices; three groups of 64 do not: there features are."""
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = vlc.load(folder, "float32", mesh, weights=name)
    jax.tree.map(np.testing.assert_array_equal, split.params, coded[name].params)
    layers = split.params["decoder"]["layers"]
    shards = {
        path: layers[part][path]["codes"].sharding.shard_shape(layers[part][path]["codes"].shape)[1:]
        for part, path in (("mlp", "down"), ("attention", "output"), ("mlp", "up"))
    }
    assert shards["down"] == (256, 192)
    assert shards["up"] == (192, 256)
    assert shards["output"] == ((96, 192) if name == "int8" else (192, 96))
    np.testing.assert_array_equal(answers(split, batch), answers(coded[name], batch))


def test_codes_lie_in_place_of_the_floats_in_every_path_of_the_library(coded, batch):
    """Ranges of layers (pruning), one step at a time, training's forward: the same weights everywhere."""
    vlm = coded["int8"]
    pruned = answers(vlm, batch, pruning=vlc.PyramidDrop(layers=(1,), keep=(1.0,)))
    np.testing.assert_array_equal(pruned, answers(vlm, batch))
    logits = vlm.model.apply({"params": vlm.params}, batch)
    last = logits[jnp.arange(len(logits)), jnp.asarray(batch.lengths) - 1]
    np.testing.assert_array_equal(last.argmax(-1), pruned[:, 0])


def test_gradients_go_through_codes_to_what_is_float(coded, batch):
    vlm = coded["int4"]
    decoder = vlm.params["decoder"]

    @jax.jit
    @jax.value_and_grad
    def loss(norm):
        layers = decoder["layers"] | {"input_norm": {"scale": norm}}
        params = vlm.params | {"decoder": decoder | {"layers": layers}}
        return jnp.square(vlm.model.apply({"params": params}, batch)).mean()

    norm = decoder["layers"]["input_norm"]["scale"]
    gradient = loss(norm)[1]
    length = jnp.sqrt(jnp.square(gradient).sum())
    step = 1e-2 * gradient / length
    found = (loss(norm + step)[0] - loss(norm - step)[0]) / 2e-2
    np.testing.assert_allclose(found, length, rtol=0.02)


def test_adapters_are_trained_beside_codes(coded, batch):
    vlm, lora = (
        coded["int4"],
        Lora(rank=2, alpha=4.0, targets=("decoder/layers/mlp", "decoder/layers/attention/output")),
    )

    def loss(params, batch):
        logits = vlm.model.apply({"params": params}, batch)
        return jnp.square(logits).mean(), {}

    step = make_train_step(lora.loss(loss), optax.adam(1e-2))
    state = init_state(lora.init(vlm.model, vlm.params), optax.adam(1e-2))
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch, vlm.params)
        losses.append(float(metrics["loss"]))
    assert losses[0] > losses[1] > losses[2]
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    joined = merge(vlm.params, state.params)
    places = param_shardings(jax.eval_shape(lambda: joined), mesh)["decoder"]["layers"]["mlp"]["down"]
    assert {name: place.spec[-2:] for name, place in places.items()} == {
        "codes": ("model", None), "scales": ("model", None), "lora_a": ("model", None), "lora_b": (None, None)
    }  # fmt: skip
    with pytest.raises(vlc.InputError, match="are codes, to which no adapters can be added"):
        lora.merged(joined)


def test_codes_themselves_are_not_trained(coded):
    with pytest.raises(vlc.InputError, match="codes"):
        init_state(split(coded["int8"].params, ("decoder",))[0], optax.sgd(0.1))


def test_zeros_halve_the_error_of_weights_on_one_side(floats, folder):
    vlm = vlc.load(folder, "float32", layout="stacked", weights=vlc.WeightCoding(4, 64, shifted=True))
    down = vlm.params["decoder"]["layers"]["mlp"]["down"]
    kernel = np.asarray(floats.params["decoder"]["layers"]["mlp"]["down"]["kernel"])
    codes, scales, zeros = (np.asarray(down[name].astype("float32")) for name in ("codes", "scales", "zeros"))
    parts = kernel.reshape(*scales.shape[:2], 64, -1)
    np.testing.assert_allclose(scales, (parts.max(2) - parts.min(2)) / 15, rtol=1e-5)  # of weights of both signs
    back = (codes.reshape(parts.shape) - zeros[:, :, None]) * scales[:, :, None]
    assert (np.abs(back - parts) <= 1.001 * scales[:, :, None]).all()
    assert np.abs(back - parts).mean() < 0.3 * scales.mean()
    assert (zeros == np.rint(zeros)).all()


def test_weights_that_are_zero_or_not_finite_code_without_noise():
    weights = np.zeros((3, 8), np.float32)
    weights[1] = np.linspace(-1, 1, 8)
    weights[2, 3] = np.inf

    class Tensors:
        def view(self, name):
            return weights

        def packed(self, name):
            return None

    coder = Coder(Tensors(), vlc.WeightCoding(4))
    codes = coder.read("codes", "", slice(0, 8), slice(0, 3))
    scales = coder.read("scales", "", slice(0, 1), slice(0, 3))
    np.testing.assert_array_equal(codes[:, 0], 0)
    assert codes[:, 1].tolist() == [-7, -5, -3, -1, 1, 3, 5, 7]
    assert (scales[0, 0], scales[0, 2]) == (0, np.inf)  # logits are not finite, which is an error where they are used
    np.testing.assert_array_equal(coder.read("codes", "", slice(2, 5), slice(1, 3)), codes[2:5, 1:])


@pytest.mark.parametrize(("coding", "layout"), [("int8", "apart"), (vlc.WeightCoding(4, 32, shifted=True), "stacked")])
def test_codes_are_saved_as_floats(folder, coding, layout, tmp_path):
    """Those that the codes stand for, so that the folder's logits are the coded model's."""
    coded = vlc.load(folder, "float32", layout=layout, weights=coding)
    with pytest.warns(UserWarning, match=r"the weights are codes \(int.*as float32"):
        vlc.save(coded, tmp_path)
    saved, stacked = flat(vlc.load(tmp_path, "float32", layout="stacked")), flat(coded.with_layout("stacked"))
    for path, kernel in saved.items():
        if (codes := stacked.get(path.replace("/kernel", "/codes"))) is None or not path.endswith("kernel"):
            np.testing.assert_array_equal(kernel, stacked[path])
            continue
        scales, zeros = (stacked.get(path.replace("/kernel", f"/{name}")) for name in ("scales", "zeros"))
        zeros, size = 0 if zeros is None else zeros, kernel.shape[1] // scales.shape[1]
        table = [np.repeat(np.broadcast_to(x, scales.shape), size, axis=1) for x in (scales, zeros)]
        np.testing.assert_allclose(kernel, (np.asarray(codes, np.float32) - table[1]) * table[0], rtol=1e-6)


def test_what_cannot_be_is_refused(folder, floats, coded):
    with pytest.raises(vlc.InputError, match=r"weights='int2' is not known: use int8, int4, float"):
        vlc.load(folder, weights="int2")
    with pytest.raises(vlc.InputError, match=r"WeightCoding\(bits=3\): use 8 or 4"):
        vlc.WeightCoding(3)
    with pytest.raises(vlc.InputError, match=r"group=0"):
        vlc.WeightCoding(4, 0)
    assert dataclasses.replace(coded["int8"].model, weights=None) == floats.model
