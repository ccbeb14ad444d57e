"""From a model that answers to a Hugging Face folder."""

import dataclasses
import os
import warnings
from pathlib import Path

import jax.numpy as jnp

from vlcache_jax.errors import InputError, VLCacheError
from vlcache_jax.files.writing import check_target, make_folder, write_text
from vlcache_jax.models.families.family import ModelConfig
from vlcache_jax.models.families.registry import config_files, read_config
from vlcache_jax.models.io.decoding_weights import float_params
from vlcache_jax.models.io.files import read_json
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.models.io.params_writer import check_params, save_params
from vlcache_jax.models.io.processor_writer import processor_files
from vlcache_jax.models.io.weights_folder import INDEX_FILE, SINGLE_FILE
from vlcache_jax.models.processor import Processor


def save(vlm: VLM, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Writes a whole checkpoint: weights, config, generation config, tokenizer, image processor, chat templates.

    `vlcache_jax.load` reads the folder, and so do `AutoProcessor` and `AutoModelForImageTextToText` of transformers.
    Parameters keep their dtypes: after training with float32 masters that is float32. Codes of weights
    (`load(..., weights="int8")`) become floats of the embedding's dtype, on the host, with a warning.

    The layout of the decoder's weights makes no difference (another than "stacked" takes a second copy of them).

    The folder may be the one that was loaded, or one of an earlier `save`: files that say the same already are left
    alone, and one rename switches from the old weights to the new ones, so that a crash at any moment leaves the whole
    old checkpoint or the whole new one. That needs two checkpoints of one model; a folder that holds another model is
    refused. In a new folder the weights come last: before they do, it does not load.

    Args:
      vlm: from `vlcache_jax.load`; with other parameters, `dataclasses.replace(vlm, params=state.params)`.
      folder: created if need be.
      max_shard_bytes: larger weights are split into files with an index.

    Raises:
      CheckpointError: the parameters do not fit the config.
      InputError: the folder holds another model, a file cannot be written, or another program
        is writing there.

    Example:
      vlm = vlc.load("llava-1.5-7b-hf", dtype="bfloat16", param_dtype="float32")
      ...
      vlc.save(dataclasses.replace(vlm, params=state.params), "fine-tuned")
    """
    root, vlm = Path(folder), vlm.with_layout("stacked")
    dtype = jnp.dtype(vlm.params["decoder"]["embed_tokens"]["embedding"].dtype).name
    if vlm.model.weights is not None:
        warnings.warn(
            f"the weights are codes ({vlm.model.weights}), and folders of codes are not written: {root} gets them as "
            f"{dtype}, each rounded once; to have codes again, load it with weights=...",
            stacklevel=2,
        )
        vlm = dataclasses.replace(vlm, params=float_params(vlm.params, dtype))
    check_params(vlm.params, vlm.config)
    wanted = _files(vlm.config, vlm.processor, dtype)
    there: dict[str, str] = {}
    if any(os.path.lexists(root / name) for name in (SINGLE_FILE, INDEX_FILE)):
        there = _files_there(root, dtype)
        if different := sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)):
            raise InputError(
                f"{root} holds another model: its {different[0]} does not say what this one's does. Config and weights "
                "cannot be replaced in one step, so choose another folder, or remove this one first"
            )
        config = read_json(root / "config.json")
        if config.get("dtype", config.get("torch_dtype")) != dtype:
            del there["config.json"]  # it tells transformers what to load the weights as, and this library nothing
    changed = {name: text for name, text in wanted.items() if name not in there}
    make_folder(root)
    for name in changed:
        inner = (root / name).parent
        if inner != root and inner.is_symlink():
            raise InputError(f"{inner} is a link to {os.readlink(inner)}, and links are not followed; remove it")
        make_folder(inner)
        check_target(root / name)
    for name, text in changed.items():
        write_text(root / name, text)
    save_params(vlm.params, root, vlm.config, max_shard_bytes)


def _files(config: ModelConfig, processor: Processor, dtype: str) -> dict[str, str]:
    """All but the weights."""
    return config_files(config, dtype) | processor_files(processor)


def _files_there(root: Path, dtype: str) -> dict[str, str]:
    """The files of a folder that has weights, as this library would write them."""
    try:
        return _files(read_config(root), Processor.from_folder(root), dtype)
    except VLCacheError as error:
        raise InputError(
            f"{root} holds weights of a model that cannot be read ({error}): choose another folder, or remove this one "
            "first"
        ) from error
