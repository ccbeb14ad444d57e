"""Writing the parameter tree as a checkpoint that transformers loads."""

import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.safetensors import FLOATS, NAMES, Entry, read_header, to_host, write_tensors
from vlcache_jax.files.writing import check_target, make_folder, only_writer, remove, replacing, write_text
from vlcache_jax.models.families.family import ModelConfig
from vlcache_jax.models.families.registry import family_of
from vlcache_jax.models.io.files import read_json
from vlcache_jax.models.io.rules import Rule, WeightRules
from vlcache_jax.models.io.weights_folder import INDEX_FILE, SINGLE_FILE

_MARK = "vlcache_jax"  # in the metadata of shards: whose they are
_SHARD = re.compile(r"model-([0-9a-f]{8}-)?\d{5}-of-\d{5}\.safetensors")


def save_params(
    params: dict[str, Any], folder: str | Path, config: ModelConfig, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes parameters as safetensors under the names of transformers, dtypes kept.

    `vlcache_jax.save` writes these and everything else that a checkpoint folder needs. With `write_config` into the
    same folder, transformers loads the weights, by `from_pretrained` of the model's class.

    Whenever the writer is killed, the folder holds the whole old weights or the whole new ones: shards get names that
    nothing has, and one rename (of the index or of the single file) or removal (of the single file, which counts before
    an index) makes them the folder's weights. Then the old ones are removed, and what killed writers left. One
    parameter at a time is brought to the host.

    Args:
      params: Nested dict of arrays, as `load_params` returns.
      folder: Created if need be. Weights already there are replaced.
      config: Of the model the parameters belong to.
      max_shard_bytes: Larger checkpoints are split into shards with an index; a tensor is never split.

    Raises:
      CheckpointError: if the parameters do not fit the config or have a dtype that is not a float.
      InputError: if the files cannot be written, or another program is writing there.
    """
    leaves, weights = check_params(params, config), family_of(config).weights
    entries = [entry for path, leaf in leaves.items() for entry in _entries(path, leaf, weights)]
    tensors = (tensor for path, leaf in leaves.items() for tensor in _tensors(path, leaf, weights))
    shards = _split(entries, max_shard_bytes)
    root = make_folder(folder)
    with only_writer(root):
        single, index = root / SINGLE_FILE, root / INDEX_FILE
        for path in (single, index):
            check_target(path)
        replaced = _named_by(index)
        if len(shards) == 1:
            with replacing(single) as stream:
                write_tensors(stream, entries, tensors, {"format": "pt"})
            remove(index)
            names: list[str] = []
        else:
            names = _new_names(root, len(shards))
            _write_shards(root, names, shards, tensors)
            remove(single)
        for path in root.iterdir():
            if path.name not in names and _SHARD.fullmatch(path.name) and (path.name in replaced or _is_ours(path)):
                remove(path)


def _write_shards(root: Path, names: list[str], shards: list[list[Entry]], tensors: Iterator[np.ndarray]) -> None:
    """Writes shards and, as the last file, their index; or, if that fails, none of them."""
    listed = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    try:
        for name, shard in zip(names, shards, strict=True):
            with replacing(root / name) as stream:
                write_tensors(stream, shard, tensors, {"format": "pt", _MARK: "shard"})
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": listed}, indent=2, sort_keys=True)
        write_text(root / INDEX_FILE, text + "\n")
    except BaseException:
        if not _named_by(root / INDEX_FILE) & set(names):
            for name in names:
                remove(root / name)
        raise


def _new_names(root: Path, count: int) -> list[str]:
    """Names of shards: the usual ones, unless there is a file of such a name."""
    tag = ""
    while True:
        names = [f"model-{tag}{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if not any((root / name).is_symlink() or (root / name).exists() for name in names):
            return names
        tag = f"{secrets.token_hex(4)}-"


def _named_by(index: Path) -> set[str]:
    """The files of an index; none if it cannot be read."""
    try:
        listed = read_json(index).get("weight_map")
    except CheckpointError:
        return set()
    return {name for name in listed.values() if isinstance(name, str)} if isinstance(listed, dict) else set()


def _is_ours(path: Path) -> bool:
    try:
        return not path.is_symlink() and _MARK in read_header(path)[1]
    except CheckpointError:
        return False


def check_params(params: dict[str, Any], config: ModelConfig) -> dict[tuple[str, ...], Any]:
    """The parameters by their paths. Raises CheckpointError, see `save_params`."""
    family = family_of(config)
    leaves = traverse_util.flatten_dict(params)
    expected = traverse_util.flatten_dict(family.model(config, np.float32).abstract_params())
    for path in sorted(leaves.keys() ^ expected.keys()):
        state = "is missing" if path in expected else "has no place in a model of this config"
        raise CheckpointError(f"parameter {'/'.join(path)} {state}")
    for path, leaf in leaves.items():
        name, shape = "/".join(path), expected[path].shape
        if NAMES.get(np.dtype(leaf.dtype)) not in FLOATS:
            raise CheckpointError(f"parameter {name} has dtype {leaf.dtype}; supported: {', '.join(FLOATS)}")
        if family.weights.by_path[path].per_layer and leaf.shape[:1] != shape[:1]:
            raise CheckpointError(f"parameter {name} is stacked over {leaf.shape[0]} layers, the config has {shape[0]}")
        if path[-1] == "embedding" and leaf.shape[0] != config.decoder.vocab_size:
            raise CheckpointError(
                f"the embedding has {leaf.shape[0]} rows, the config's vocab_size is {config.decoder.vocab_size}"
            )
        if leaf.shape != shape:
            raise CheckpointError(f"parameter {name} has the shape {list(leaf.shape)}, the config gives {list(shape)}")
    return leaves


def _entries(path: tuple[str, ...], leaf: Any, weights: WeightRules) -> Iterator[Entry]:
    """The tensors a parameter becomes. `_tensors` yields their data in the same order."""
    rule: Rule = weights.by_path[path]
    dtype = np.dtype(leaf.dtype)
    if rule.per_layer:
        for layer in range(leaf.shape[0]):
            yield Entry(rule.name.format(layer=layer), dtype, rule.theirs(leaf.shape[1:]))
    else:
        yield Entry(rule.name, dtype, rule.theirs(leaf.shape))
    for name, like, _ in weights.written:
        if like == path:
            yield Entry(name, dtype, leaf.shape)


def _tensors(path: tuple[str, ...], leaf: Any, weights: WeightRules) -> Iterator[np.ndarray]:
    rule: Rule = weights.by_path[path]
    values = to_host("/".join(path), leaf)
    back = None if rule.axes is None else np.argsort(rule.axes)
    for value in values if rule.per_layer else [values]:
        yield value if back is None else value.transpose(back)
    for _, like, filling in weights.written:
        if like == path:
            yield np.full_like(values, filling)


def _split(entries: list[Entry], max_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards
