"""Families by the model types of their checkpoints. A new one is a folder beside this file and its name here."""

import difflib
import json
from pathlib import Path
from typing import Any

from vlcache_jax.errors import InputError
from vlcache_jax.files.writing import make_folder, write_text
from vlcache_jax.models.decoder.config_writer import token_values
from vlcache_jax.models.families.family import Family, ModelConfig
from vlcache_jax.models.families.gemma3.family import GEMMA3
from vlcache_jax.models.families.idefics3.family import IDEFICS3
from vlcache_jax.models.families.internvl.family import INTERNVL
from vlcache_jax.models.families.llava.family import LLAVA
from vlcache_jax.models.families.qwen_vl.family import QWEN2_VL, QWEN3_VL
from vlcache_jax.models.io.files import Folder, checkpoint_folder, file_inside, read_json
from vlcache_jax.models.io.packed.scheme import Scheme, read_scheme
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.io.unsupported import no_config

_ALL = (LLAVA, GEMMA3, IDEFICS3, INTERNVL, QWEN2_VL, QWEN3_VL)
FAMILIES: dict[str, Family] = {model_type: family for family in _ALL for model_type in family.model_types}
"""The family of every `model_type` that is read."""


def register(family: Family) -> None:
    """Adds a family: from now on `vlcache_jax.load` reads its checkpoints.

    Raises:
      InputError: another family reads one of its model types.
    """
    for model_type in family.model_types:
        if FAMILIES.get(model_type, family) is not family:
            raise InputError(f"model type {model_type!r} belongs to another family: give the new one its own")
    FAMILIES.update(dict.fromkeys(family.model_types, family))


def family_of(config: ModelConfig) -> Family:
    """The family of a model's config."""
    return FAMILIES[config.model_type]


def read_config(folder: Folder) -> Any:
    """What a checkpoint folder's `config.json` (and `generation_config.json`, if any) describes.

    Raises:
      CheckpointError: a file is missing or malformed, or describes a model that is not supported; the message names the
        key, the value and what is supported.
    """
    root = checkpoint_folder(folder)
    if not root.has("config.json"):
        raise no_config(root)
    path = file_inside(root, "config.json")
    top = Section(path, "", read_json(path), {})
    refused = {name: why for family in FAMILIES.values() for name, why in family.refused.items()}
    hint = refused.get(str(top.get("model_type")).lower())
    family = FAMILIES[top.choice("model_type", "", FAMILIES, f"; {hint}" if hint else "")]
    read_scheme(top)
    return family.read_config(root, top)


def read_weights_scheme(folder: Folder) -> Scheme | None:
    """How the weights of a checkpoint folder are packed; None if they are floats. Raises as `read_config` does."""
    path = file_inside(folder, "config.json")
    return read_scheme(Section(path, "", read_json(path), {}))


def config_files(config: ModelConfig, dtype: str = "float32") -> dict[str, str]:
    """The texts of `config.json` and `generation_config.json` for transformers 5, by their names.

    Raises:
      CheckpointError: a `config.json` of the family cannot say what the config does.
    """
    tokens = {name: value for name, value in token_values(config).items() if value is not None}
    files = {"config.json": family_of(config).config_values(config, dtype), "generation_config.json": tokens}
    return {name: json.dumps(values, indent=2, sort_keys=True) + "\n" for name, values in files.items()}


def write_config(config: ModelConfig, folder: str | Path, dtype: str = "float32") -> None:
    """Writes `config_files` into a folder, which is made if need be.

    Args:
      config: what to write.
      folder: where.
      dtype: what transformers shall load the weights as: float32, bfloat16 or float16.

    Raises:
      CheckpointError: see `config_files`.
      InputError: a file cannot be written.
    """
    root = make_folder(folder)
    for name, text in config_files(config, dtype).items():
        write_text(root / name, text)


def presets() -> dict[str, Any]:
    """Configs of published models, by their names."""
    return {name: config for family in FAMILIES.values() for name, config in family.presets.items()}


def preset(name: str) -> Any:
    """The config of a published model.

    Raises:
      InputError: an unknown name; the message lists the known ones, the nearest first.

    Example:
      >>> preset("llava-v1.6-mistral-7b").decoder.num_kv_heads
      8
    """
    known = presets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=len(known), cutoff=0.0)
        raise InputError(f"model {name!r} is neither a folder nor a preset: use one of {', '.join(near)}, or a folder")
    return known[name]
