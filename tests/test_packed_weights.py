"""AWQ, GPTQ and compressed-tensors folders: what they stand for, bit for bit, and what is refused by name."""

import json

import numpy as np
import pytest
from cut_demo import cut_demo
from flax import traverse_util
from packed_folders import pack_folder, words
from safetensors.numpy import load_file, save_file

import vlcache_jax as vlc
from vlcache_jax.models.families.registry import family_of
from vlcache_jax.models.io.packed.words import signed, unpack

KINDS = {
    "awq": ("awq", 4, 64, False),
    "gptq": ("gptq", 4, 64, True),
    "gptq_shifted": ("gptq", 4, 64, False),
    "gptq_v2_bytes": ("gptq_v2", 8, None, True),
    "packed_groups": ("pack-quantized", 4, 64, True),
    "packed_shifted": ("pack-quantized", 4, 64, False),
    "packed_bytes": ("pack-quantized", 8, None, True),
    "bytes": ("int-quantized", 8, None, True),
    "bytes_shifted": ("int-quantized", 8, 64, False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cut_demo(tmp_path_factory.mktemp("demo"))


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def kernels(vlm):
    """The projections as floats, by the names of their tensors."""
    vlm = vlm.with_layout("stacked")
    flat, rules = traverse_util.flatten_dict(vlm.params), family_of(vlm.config).weights.by_path
    found = {}
    for path, leaf in flat.items():
        if path[:2] != ("decoder", "layers") or path[-1] not in ("codes", "kernel"):
            continue
        if path[-1] == "codes":
            scales, zeros = flat[(*path[:-1], "scales")], flat.get((*path[:-1], "zeros"), 0)
            parts = np.asarray(leaf.astype("float32")).reshape(*scales.shape[:2], -1, leaf.shape[-1])
            leaf = (
                (parts - np.asarray(zeros)[..., None, :] if np.ndim(zeros) else parts) * scales[:, :, None]
            ).reshape(leaf.shape)
        rule = rules[(*path[:-1], "kernel")]
        found |= {rule.name.format(layer=i): np.asarray(x).T for i, x in enumerate(leaf)}
    return found


@pytest.mark.parametrize(("bits", "expected"), [
    (4, [[440163952, 55032], [1584435892, 6716]]),
    (8, [[2105966456, 2038594436, -2055305344], [-2122677380, 2105966456, 2038594436]]),
])  # fmt: skip
def test_words_are_those_of_compressed_tensors(bits, expected):
    """Expected: `pack_to_int32(torch.tensor(numbers), bits)` of compressed-tensors 0.20.0."""
    numbers = (np.arange(24).reshape(2, 12) * 7) % 16 - 8
    packed = np.asarray(expected, np.int32)
    np.testing.assert_array_equal(words(numbers + 2 ** (bits - 1), bits), packed)
    np.testing.assert_array_equal(signed(unpack(packed, bits, slice(3, 12)), bits), numbers[:, 3:])


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_floats_are_what_the_folder_stands_for(kind, folder, tmp_path):
    layout, bits, group, symmetric = KINDS[kind]
    expected = pack_folder(folder, tmp_path / "packed", layout, bits, group, symmetric)
    assert len(expected) == 14
    own, floats = (vlc.load(tmp_path / "packed", "float32", weights=weights) for weights in (None, "float"))
    assert own.model.weights == vlc.WeightCoding(bits, group, shifted=not symmetric)
    for vlm in (own, floats):
        found = kernels(vlm)
        assert found.keys() == expected.keys()
        for name, values in found.items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-9)


def test_a_packed_folder_answers_as_its_floats_do_and_can_be_coded_anew(folder, tmp_path):
    pack_folder(folder, tmp_path / "packed", "awq", 4, 64, False)
    own, floats, anew = (vlc.load(tmp_path / "packed", "float32", weights=w) for w in (None, "float", "int8"))
    batch = own.processor(images=[[]], text=["serial number total of 4 and 5"])
    one, other = (vlc.generate(vlm.model, vlm.params, batch, vlc.FullCache(), 4).tokens for vlm in (own, floats))
    np.testing.assert_array_equal(one, other)
    assert anew.model.weights == vlc.WeightCoding(8)
    for name, values in kernels(anew).items():
        np.testing.assert_allclose(values, kernels(floats)[name], atol=0.5 * np.abs(values).max() / 100)


def test_channels_in_an_order_of_their_own_are_read_as_floats_or_coded_anew(folder, tmp_path):
    order = np.random.default_rng(1).permutation(192) // 64
    expected = pack_folder(folder, tmp_path / "packed", "gptq", 4, 64, True, order, but=("down_proj",))
    found = kernels(vlc.load(tmp_path / "packed", "float32", weights="float"))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-9)
    with pytest.raises(vlc.CheckpointError, match=r"its groups are not consecutive channels\. Load with\s+weights="):
        vlc.load(tmp_path / "packed")
    vlc.load(tmp_path / "packed", weights="int8")


def test_some_weights_packed_and_some_not_is_refused_with_the_remedy(folder, tmp_path):
    pack_folder(folder, tmp_path / "packed", "gptq", 4, 64, but=("down_proj",))
    with pytest.raises(vlc.CheckpointError, match=r"mlp\.down_proj\.weight.* it is not packed"):
        vlc.load(tmp_path / "packed")
    assert vlc.load(tmp_path / "packed", weights="int4").model.weights == vlc.WeightCoding(4, 128)


@pytest.mark.parametrize(("layout", "values", "named"), [
    ("awq", {"version": "gemv"}, r"version is .gemv.; expected gemm"),
    ("awq", {"zero_point": False}, r"zero_point is False"),
    ("awq", {"bits": 3}, r"bits is 3; expected 4"),
    ("gptq", {"bits": 3}, r"bits is 3; expected 4 or 8"),
    ("gptq", {"checkpoint_format": "marlin"}, r"checkpoint_format is .marlin."),
    ("gptq", {"dynamic": {"-:.*down.*": {}}}, r"dynamic"),
    ("pack-quantized", {"format": "nvfp4-pack-quantized"}, r"format is .nvfp4-pack-quantized."),
    ("pack-quantized", {"format": "float-quantized"}, r"format is .float-quantized."),
    ("pack-quantized", {"transform_config": {"x": 1}}, r"transform_config"),
    ("pack-quantized", {"quant_method": "hqq"}, r"quant_method is .hqq.*awq, gptq, compressed-tensors are read"),
])  # fmt: skip
def test_other_layouts_are_refused_by_name(layout, values, named, folder, tmp_path):
    pack_folder(folder, tmp_path / "packed", layout, 4, 64, layout != "awq", but=(".1.", "mlp"))
    change(tmp_path / "packed", **values)
    with pytest.raises(vlc.CheckpointError, match=named):
        vlc.load(tmp_path / "packed")


@pytest.mark.parametrize(("part", "damage", "named"), [
    ("qzeros", lambda x: x[:, :-1].copy(), r"q_proj\.weight.*qzeros has the shape"),
    ("scales", lambda x: x.astype(np.int32), r"scales is I32"),
    ("g_idx", lambda x: x + 7, r"g_idx names groups that there are none of"),
    ("qzeros", lambda x: x + 1, r"not those of symmetric codes"),
    ("scales", lambda x: None, r"its scales is missing"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_named(part, damage, named, folder, tmp_path):
    pack_folder(folder, tmp_path / "packed", "gptq", 4, 64)
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(f"q_proj.{part}"))
    damaged = damage(tensors.pop(name))
    save_file(tensors | ({} if damaged is None else {name: damaged}), file)
    with pytest.raises(vlc.CheckpointError, match=named):
        vlc.load(tmp_path / "packed")
