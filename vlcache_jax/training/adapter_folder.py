"""Adapters as PEFT (https://github.com/huggingface/peft) saves them.

adapter_config.json          rank, alpha, which modules, by their names in transformers
adapter_model.safetensors    base_model.model.<module>.lora_A.weight [rank, in], ....lora_B.weight [out, rank]
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.files.limits import ADAPTER_DROPOUT, ADAPTER_RANK, ADAPTER_SCALE
from vlcache_jax.files.safetensors import Entry, quoted, to_host, write_tensors
from vlcache_jax.files.writing import check_target, make_folder, replacing, write_text
from vlcache_jax.models.families.registry import family_of
from vlcache_jax.models.io.files import checkpoint_folder, file_inside, read_json
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.io.unsupported import ADAPTER_CONFIG
from vlcache_jax.models.io.weights_folder import SafetensorsFolder
from vlcache_jax.training.lora import Lora, ParamPath, adaptable, place_adapters
from vlcache_jax.training.state import Params

_FILE, _PREFIX = "adapter_model.safetensors", "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
# What changes the sum of kernel and adapter into something else, or the kernels themselves.
_UNKNOWN = (
    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters",
    "use_qalora", "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "use_bdlora", "velora_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
_INITIAL = ("gaussian", "orthogonal", "eva")  # others than these start from changed kernels


def save_adapters(
    path: str | os.PathLike[str], lora: Lora, adapters: Params, vlm: VLM, base: str | None = None
) -> None:
    """Writes adapters in PEFT's format, which `load_adapters` and `PeftModel.from_pretrained` read.

    The weights come last, by one rename: a killed writer leaves no adapters, or those that were there.

    Args:
      path: of the folder, created if need be. It may hold earlier adapters of the same kind.
      lora: what they are.
      adapters: `state.params`; of other trained parameters beside them (a projector's) save the whole model.
      vlm: the model that they adapt.
      base: what PEFT shall load it from: a folder, or an id on the Hugging Face Hub.

    Raises:
      InputError: there are other parameters than adapters, the folder holds adapters of another kind, or a file cannot
        be written.

    Example:
      save_adapters("adapters", lora, state.params, vlm, "llava-hf/llava-1.5-7b-hf")
    """
    flat, weights = flatten_dict(adapters), family_of(vlm.config).weights
    if other := [path for path in flat if path[-1] not in ("lora_a", "lora_b")]:
        raise InputError(
            f"{'/'.join(other[0])} is no adapter: merge what was trained and save the whole model (lora.merged, "
            "vlcache_jax.save)"
        )
    tensors, modules = {}, []
    for path_ in sorted({path[:-1] for path in flat}):
        name = weights.by_path[(*path_, "kernel")].name.removesuffix(".weight")
        a, b = (to_host("/".join((*path_, side)), flat[(*path_, side)]) for side in ("lora_a", "lora_b"))
        layers = range(len(a)) if "{layer}" in name else [None]
        modules.append(_pattern(weights.module(name), layers))
        for layer in layers:
            start = f"{_PREFIX}{weights.module(name)}".format(layer=layer)
            for side, x in (("A", a), ("B", b)):
                tensors[f"{start}.lora_{side}.weight"] = np.ascontiguousarray((x if layer is None else x[layer]).T)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilised,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": "|".join(modules),
    }
    text = json.dumps(config, indent=2) + "\n"
    folder = make_folder(path)
    if os.path.lexists(folder / _FILE) and _text(folder / ADAPTER_CONFIG) != text:
        raise InputError(f"{folder} holds other adapters: choose another folder, or remove this one first")
    for name in (ADAPTER_CONFIG, _FILE):
        check_target(folder / name)
    write_text(folder / ADAPTER_CONFIG, text)
    entries = [Entry(name, x.dtype, x.shape) for name, x in tensors.items()]
    with replacing(folder / _FILE) as stream:
        write_tensors(stream, entries, tensors.values(), {"format": "pt"})


def load_adapters(path: str | os.PathLike[str], vlm: VLM) -> tuple[Lora, Params]:
    """Reads adapters that PEFT or `save_adapters` wrote.

    Args:
      path: the folder.
      vlm: the model that they adapt, its weights stacked ("stacked" layout).

    Returns:
      (what they are, adapters float32): `lora.merged(merge(vlm.params, adapters))` are the adapted model's
      parameters, and training may go on from them. Layers without an adapter have zeros, with which they stay as they
      are. Ranks and alphas of single modules are turned into the one of all.

    Raises:
      CheckpointError: files are missing, unsafe or corrupt, it is another kind of adapter than LoRA, or its modules are
        not this model's.

    Example:
      lora, adapters = load_adapters("adapters", vlm)
    """
    folder = checkpoint_folder(path)
    file = file_inside(folder, ADAPTER_CONFIG)
    config = Section(file, "", read_json(file), {})
    lora = _read_config(config)
    if not folder.has(_FILE):
        raise CheckpointError(
            f"{folder} has no {_FILE}; pickled weights (adapter_model.bin) can run code when read, and are refused: "
            "save the adapters with PEFT again, which writes safetensors"
        )
    reader = SafetensorsFolder(folder, _FILE)
    weights, params = family_of(vlm.config).weights, flatten_dict(vlm.params)
    shapes = {
        path: params.get((*path, "kernel"), params.get((*path, "codes"))).shape for path in adaptable(weights, params)
    }
    known = {weights.by_path[(*path, "kernel")].name: path for path in shapes}
    found: dict[tuple[ParamPath, int | None], dict[str, np.ndarray]] = {}
    for name in sorted(reader.tensors):
        match = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
        where, layer = weights.canonical(f"{match['module']}.weight") if match else ("", None)
        if match is None or where not in known:
            raise CheckpointError(
                f"{folder / _FILE}: {quoted(name)} is no adapter of a linear layer of this model, a "
                f"{vlm.config.model_type}: give the model that it was trained on"
            )
        path_ = known[where]
        if layer is not None and layer >= shapes[path_][0] and path_[0] in weights.shortened:
            continue  # of a layer that is not computed
        found.setdefault((path_, layer), {})[match["side"]] = reader.view(name).astype(np.float32)
    adapters: dict[ParamPath, np.ndarray] = {}
    for path_ in sorted({path for path, _ in found}):
        own = {layer: pair for (path, layer), pair in found.items() if path == path_}
        name = weights.by_path[(*path_, "kernel")].name.removesuffix(".weight")
        pairs = {}
        for layer, pair in own.items():
            module = weights.module(name).format(layer=layer)
            pairs[layer] = _checked(file, config, lora, module, pair, shapes[path_], layer)
        for key, x in zip(("lora_a", "lora_b"), _stacked(pairs, shapes[path_])):
            adapters[(*path_, key)] = x
    if not adapters:
        raise CheckpointError(f"{folder / _FILE} holds no adapters; save them again")
    targets = tuple("/".join(path) for path in sorted({path[:-1] for path in adapters}))
    return Lora(**lora, targets=targets), place_adapters(adapters, vlm.params)


def _read_config(config: Section) -> dict[str, Any]:
    """Rank, alpha and scaling of an adapter_config.json. Raises CheckpointError for what is not LoRA as it is here."""
    config.choice("peft_type", "", ["LORA"], ": other adapters are no products of two matrices beside a kernel")
    for key in _UNKNOWN:
        if config.get(key):
            raise config.error(key, config.get(key), "none: plain LoRA alone is read; merge the adapters with PEFT")
    config.choice("bias", "none", ["none"])
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in _INITIAL:
        raise config.error("init_lora_weights", start, "adapters of unchanged kernels; convert or merge them with PEFT")
    return {
        "rank": config.integer("r", ADAPTER_RANK),
        "alpha": config.number("lora_alpha", ADAPTER_SCALE),
        "rank_stabilised": config.flag("use_rslora", False),
        "dropout": config.number("lora_dropout", ADAPTER_DROPOUT, 0.0),
    }


def _of_module(config: Section, key: str, module: str, default: float) -> float:
    """The entry of `rank_pattern` or `alpha_pattern` for a module: names, or ends of names."""
    for name in config.section(key).values:
        if re.fullmatch(r"\^?[\w.]{1,300}\$?", name) is None:
            raise config.error(key, name, "names of modules; merge the adapters with PEFT")
        plain = name.strip("^$")
        if module == plain or (module.endswith(f".{plain}") and not name.startswith("^")):
            limits = ADAPTER_RANK if key == "rank_pattern" else ADAPTER_SCALE
            return config.section(key).number(name, limits)
    return default


def _checked(
    file: Path,
    config: Section,
    lora: dict[str, Any],
    module: str,
    pair: dict[str, np.ndarray],
    shape: tuple[int, ...],
    layer: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """(a [in, rank], b [rank, out]) of a module, b so that the common scale is right for it."""
    rank = int(_of_module(config, "rank_pattern", module, lora["rank"]))
    own = Lora(rank=rank, alpha=_of_module(config, "alpha_pattern", module, lora["alpha"]),
               rank_stabilised=lora["rank_stabilised"])  # fmt: skip
    wanted = {"A": (rank, shape[-2]), "B": (shape[-1], rank)}
    shapes = {side: x.shape for side, x in pair.items()}
    if shapes != wanted or (layer is not None and layer >= shape[0]):
        raise CheckpointError(
            f"{file.with_name(_FILE)}: the adapter of {module} has the shapes {shorten(shapes)}, expected {wanted}"
            + ("" if layer is None else f", in {shape[0]} layers: give the model that it was trained on")
        )
    ratio = own.scale / Lora(**lora).scale
    return pair["A"].T, pair["B"].T * np.float32(ratio)


def _stacked(pairs: dict[int | None, tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...]) -> list[np.ndarray]:
    """Pairs of layers as two arrays over all layers, smaller ranks filled up with zeros."""
    if None in pairs:
        return list(pairs[None])
    rank = max(a.shape[1] for a, _ in pairs.values())
    both = [np.zeros((shape[0], shape[1], rank), np.float32), np.zeros((shape[0], rank, shape[2]), np.float32)]
    for layer, (a, b) in pairs.items():
        both[0][layer, :, : a.shape[1]] = a
        both[1][layer, : b.shape[0]] = b
    return both


def _pattern(module: str, layers: Any) -> str:
    """A regular expression of a module's names, for PEFT's `target_modules`."""
    numbers = "(?:" + "|".join(map(str, layers)) + ")"
    return re.escape(module).replace(r"\{layer\}", numbers)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() and not path.is_symlink() else None
    except (OSError, UnicodeDecodeError):
        return None
