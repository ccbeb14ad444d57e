"""Folders with packed weights, packed number by number from what their formats' descriptions say."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of AWQ: the output that each nibble of a word holds, lowest bits first


def words(numbers, bits, order=None):
    """Unsigned numbers [rows, n], packed along the last axis: u32 words as i32."""
    count = 32 // bits
    padded = np.pad(np.asarray(numbers, np.uint64), [(0, 0), (0, -numbers.shape[1] % count)])
    out = np.zeros((len(padded), padded.shape[1] // count), np.uint64)
    for word in range(out.shape[1]):
        for place in range(count):
            number = place if order is None else order[place]
            out[:, word] |= padded[:, word * count + number] << np.uint64(bits * place)
    return out.astype(np.uint32).view(np.int32)


def pack(layout, weight, bits, group, symmetric, rng, g_idx=None):
    """A weight [out, in] as (tensors by what follows the module's name, the floats that they stand for)."""
    features, channels = weight.shape
    size = group or channels
    groups, top, middle = channels // size, 2**bits - 1, 2 ** (bits - 1)
    scales = (np.abs(weight).reshape(features, groups, size).max(-1) / middle + 1e-4).astype(np.float16)
    zeros = np.full((features, groups), middle) if symmetric else rng.integers(1, top, (features, groups))
    of_group = np.arange(channels) // size if g_idx is None else g_idx
    wide = scales.astype(np.float32)[:, of_group]
    q = np.clip(np.rint(weight / wide) + zeros[:, of_group], 0, top).astype(np.int64)
    floats = (q - zeros[:, of_group]).astype(np.float32) * wide
    if layout == "awq":
        tensors = {"qweight": words(q.T, 4, ORDER), "qzeros": words(zeros.T, 4, ORDER), "scales": scales.T.copy()}
    elif layout.startswith("gptq"):
        stored = zeros - 1 if layout == "gptq" else zeros
        tensors = {"qweight": words(q, bits).T.copy(), "qzeros": words(stored.T, bits), "scales": scales.T.copy()}
        tensors["g_idx"] = of_group.astype(np.int32)
    elif layout == "pack-quantized":
        tensors = {"weight_packed": words(q, bits), "weight_scale": scales}
        tensors["weight_shape"] = np.array([features, channels], np.int64)
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros.T, bits).T.copy()
    else:
        tensors = {"weight": (q - middle).astype(np.int8), "weight_scale": scales}
        if not symmetric:
            tensors["weight_zero_point"] = (zeros - middle).astype(np.int8)
    return tensors, floats


def config_of(layout, bits, group, symmetric):
    """The `quantization_config`."""
    if layout == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    if layout.startswith("gptq"):
        return {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": symmetric, "desc_act": False,
                "checkpoint_format": layout}  # fmt: skip
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel",
               "group_size": group}  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


def pack_folder(source, target, layout, bits=4, group=None, symmetric=True, g_idx=None, but=()):
    """Copies a checkpoint, the projections of its decoder's layers packed but those whose names hold one of `but`.

    Returns what the packed weights stand for, by their names.
    """
    rng, expected, tensors = np.random.default_rng(0), {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        text = "vision" not in name and "visual" not in name and ".layers." in name
        if text and name.endswith("proj.weight") and not any(part in name for part in but):
            made, expected[name] = pack(layout, tensor.astype(np.float32), bits, group, symmetric, rng, g_idx)
            tensors |= {f"{name.removesuffix('.weight')}.{part}": x for part, x in made.items()}
        else:
            tensors[name] = tensor
    target.mkdir()
    for path in Path(source).iterdir():
        if path.suffix in (".json", ".jinja"):
            (target / path.name).write_bytes(path.read_bytes())
    save_file(tensors, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = config_of(layout, bits, group, symmetric)
    (target / "config.json").write_text(json.dumps(config))
    return expected
