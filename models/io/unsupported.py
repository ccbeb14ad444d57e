"""Folders that hold something else than a whole model in safetensors: what they hold, and what to do about it."""

import re
import warnings
from typing import Any

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.models.io.files import CheckpointFolder, file_inside, read_json

ADAPTER_CONFIG = "adapter_config.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_VARIANT = re.compile(r"model(\.safetensors\.index)?\.([A-Za-z0-9_-]+?)(-\d+-of-\d+)?\.(safetensors|json)")
# How quantised checkpoints call what they store in place of a weight; of GPTQ and AWQ, bitsandbytes, compressed-tensors
# and fp8, HQQ and torchao.
_QUANTISED_TENSOR = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.\w+|SCB|weight_packed|"
    r"weight_scale|weight_scale_inv|weight_zero_point|input_scale|weight_shape|W_q)$"
)
DEQUANTISE = (
    "use the checkpoint that it was made from; or load it with transformers, call model.dequantize() (which some "
    "methods have) and save_pretrained(another_folder)"
)


def no_config(folder: CheckpointFolder) -> CheckpointError:
    """Why a folder without config.json is no checkpoint."""
    if folder.has(ADAPTER_CONFIG):
        return _adapter_only(folder)
    return CheckpointError(
        f"{folder / 'config.json'} is missing: {folder} is no checkpoint folder, or its download is incomplete; give "
        "the folder that holds config.json, tokenizer.json and the weights"
    )


def no_weights(folder: CheckpointFolder, names: list[str] | None = None) -> CheckpointError:
    """Why a folder that has neither model.safetensors nor an index has no weights to read.

    Args:
      folder: the folder.
      names: of all files of the model, if more are known than the folder has.
    """
    names = names or sorted(path.name for path in folder.path.iterdir())
    if ADAPTER_CONFIG in names:
        return _adapter_only(folder)
    pickled = [name for name in names if name.endswith(_PICKLED)]
    variants = sorted({match[2] for name in names if (match := _VARIANT.fullmatch(name))} - {"index"})
    if variants:
        return CheckpointError(
            f"{folder} has weights only as the variant {', '.join(variants)} "
            f"(such as {next(name for name in names if _VARIANT.fullmatch(name))}): the names without the variant are "
            "read. Rename the files (model.safetensors; of several files the index and the names in it, too), or load "
            f"the model with transformers (variant={variants[0]!r}) and call save_pretrained(another_folder). The "
            "element type does not matter: weights are cast when they are loaded"
        )
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if shards:
        return CheckpointError(
            f"{folder} has the shard {shards[0]}, but no model.safetensors.index.json that lists them: download it, too"
        )
    if pickled:
        return CheckpointError(
            f"{folder} has weights only as {', '.join(pickled[:5])}{', ...' if len(pickled) > 5 else ''}; such files "
            "are pickled and can run code when read, so they are refused. Convert them once: load the model with "
            "transformers in an environment you trust and call save_pretrained(folder), which writes safetensors"
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    found = f" (it has {', '.join(others[:5])})" if others else ""
    return CheckpointError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json{found}; download the weights there"
    )


def warn_of_adapter(folder: CheckpointFolder) -> None:
    """Warns if a folder that is read as a whole model holds an adapter, which transformers would apply."""
    if folder.has(ADAPTER_CONFIG):
        warnings.warn(
            f"{folder / ADAPTER_CONFIG} belongs to an adapter (LoRA or another of PEFT): the weights of the folder are "
            "loaded as they are and the adapter is not applied; merge the two with PEFT if it is meant to be",
            stacklevel=3,
        )


def _adapter_only(folder: CheckpointFolder) -> CheckpointError:
    base = read_json(file_inside(folder, ADAPTER_CONFIG)).get("base_model_name_or_path")
    of = f" of {shorten(base)}" if isinstance(base, str) else ""
    return CheckpointError(
        f"{folder} holds an adapter (LoRA or another of PEFT){of}, not a whole model: load that, then "
        "this folder with vlcache_jax.training.load_adapters; or merge the two with PEFT: "
        "model = AutoPeftModelForImageTextToText.from_pretrained(folder) or PeftModel.from_pretrained(base_model, "
        "folder), then model.merge_and_unload().save_pretrained(another_folder), and save the processor there, too"
    )


def quantisation_method(value: Any) -> str:
    """What a `quantization_config` says that its method is, for messages."""
    method = value.get("quant_method") if isinstance(value, dict) else None
    if method is None and isinstance(value, dict) and any(str(k).startswith(("load_in_", "bnb_")) for k in value):
        method = "bitsandbytes"
    return shorten(value) if method is None else shorten(method)


def refuse_quantised_tensors(folder: CheckpointFolder, names: list[str]) -> None:
    """Raises CheckpointError if one of the tensors is part of a quantised weight that config.json does not tell of."""
    found = next((name for name in names if _QUANTISED_TENSOR.search(name)), None)
    if found is not None:
        raise CheckpointError(
            f"the weights in {folder} are quantised (it has the tensor {found[:200]!r}) in a way that its config.json "
            f"does not tell: {DEQUANTISE}"
        )
