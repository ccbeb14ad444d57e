"""Writing the parameter tree as a checkpoint that transformers loads."""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from flax import traverse_util

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.checkpoint.copying import copy_cast
from vlcache_jax.models.checkpoint.mapping import BY_PATH, Rule
from vlcache_jax.models.checkpoint.safetensors_reader import DTYPES, INDEX_FILE, SINGLE_FILE
from vlcache_jax.models.config import LlavaConfig

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_POST_NORM = "vision_tower.vision_model.post_layernorm"

Entry = tuple[str, str, tuple[int, ...]]  # name, dtype's name, shape


def save_params(
    params: dict[str, Any], folder: str | Path, config: LlavaConfig, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes parameters as safetensors under the names of transformers, dtypes kept.

    With `write_config` into the same folder, `LlavaForConditionalGeneration.from_pretrained` (or the
    LLaVA-NeXT one) loads it. Files are written beside their final names and renamed at the end, so a crash
    never leaves half a file under a valid name. One parameter at a time is brought to the host.

    Args:
      params: Nested dict of arrays, as `load_params` returns.
      folder: Created if need be. Weights already there are replaced.
      config: Of the model the parameters belong to.
      max_shard_bytes: Larger checkpoints are split into shards with an index; a tensor is never split.

    Raises:
      CheckpointError: if the parameters do not fit the config or have a dtype that is not a float.
    """
    leaves = _checked(params, config)
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    shards = _split([entry for path, leaf in leaves.items() for entry in _entries(path, leaf)], max_shard_bytes)
    if len(shards) == 1:
        names = [SINGLE_FILE]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]

    tensors = (tensor for path, leaf in leaves.items() for tensor in _tensors(path, leaf))
    written: list[Path] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            written.append(root / f"{name}.tmp-{os.getpid()}")
            with written[-1].open("wb") as stream:
                _write(stream, shard, tensors)
        for name, path in zip(names, written, strict=True):
            os.replace(path, root / name)
    finally:
        for path in written:
            path.unlink(missing_ok=True)
    if len(shards) > 1:
        _write_index(root, names, shards)
    # Last, so that there is a complete checkpoint at any time.
    keep = {*names, *([INDEX_FILE] if len(shards) > 1 else [])}
    for path in root.iterdir():
        ours = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", path.name)
        if ours and path.name not in keep:
            path.unlink()


def _checked(params: dict[str, Any], config: LlavaConfig) -> dict[tuple[str, ...], Any]:
    leaves = traverse_util.flatten_dict(params)
    expected = _expected_paths(config)
    for path in sorted(leaves.keys() ^ expected):
        state = "is missing" if path in expected else "has no place in a model of this config"
        raise CheckpointError(f"parameter {'/'.join(path)} {state}")
    layers = {"vision": config.vision.num_layers, "decoder": config.decoder.num_layers}
    for path, leaf in leaves.items():
        name = "/".join(path)
        if np.dtype(leaf.dtype) not in _DTYPE_NAMES:
            raise CheckpointError(f"parameter {name} has dtype {leaf.dtype}; supported: {', '.join(DTYPES)}")
        if BY_PATH[path].per_layer and leaf.shape[0] != layers[path[0]]:
            raise CheckpointError(
                f"parameter {name} is stacked over {leaf.shape[0]} layers, the config has {layers[path[0]]}"
            )
    rows, vocab_size = leaves[("decoder", "embed_tokens", "embedding")].shape[0], config.decoder.vocab_size
    if rows != vocab_size:
        raise CheckpointError(f"the embedding has {rows} rows, the config's vocab_size is {vocab_size}")
    return leaves


def _expected_paths(config: LlavaConfig) -> set[tuple[str, ...]]:
    decoder = config.decoder
    attention, mlp = ("decoder", "layers", "attention"), ("decoder", "layers", "mlp")
    optional: dict[tuple[str, ...], bool] = {
        ("decoder", "lm_head", "kernel"): not decoder.tie_embeddings,
        ("image_newline",): bool(config.grid_pinpoints),
        **{(*attention, name, "bias"): decoder.qkv_bias for name in ("query", "key", "value")},
        (*attention, "output", "bias"): decoder.output_bias,
        **{(*mlp, name, "bias"): decoder.mlp_bias for name in ("gate", "up", "down")},
        **{("projector", name, "bias"): config.projector_bias for name in ("linear_1", "linear_2")},
    }
    return {path for path in BY_PATH if optional.get(path, True)}


def _entries(path: tuple[str, ...], leaf: Any) -> Iterator[Entry]:
    """The tensors a parameter becomes. `_tensors` yields their data in the same order."""
    rule: Rule = BY_PATH[path]
    dtype = _DTYPE_NAMES[np.dtype(leaf.dtype)]
    if rule.per_layer:
        for layer in range(leaf.shape[0]):
            yield rule.name.format(layer=layer), dtype, rule.theirs(leaf.shape[1:])
    else:
        yield rule.name, dtype, rule.theirs(leaf.shape)
    if path == ("vision", "pre_norm", "bias"):
        # transformers has this norm though LLaVA never reaches it; without it loading would warn.
        yield f"{_POST_NORM}.weight", dtype, leaf.shape
        yield f"{_POST_NORM}.bias", dtype, leaf.shape


def _tensors(path: tuple[str, ...], leaf: Any) -> Iterator[np.ndarray]:
    rule: Rule = BY_PATH[path]
    values = np.asarray(jax.device_get(leaf))
    back = None if rule.axes is None else np.argsort(rule.axes)
    for value in values if rule.per_layer else [values]:
        yield value if back is None else value.transpose(back)
    if path == ("vision", "pre_norm", "bias"):
        yield np.ones_like(values)
        yield np.zeros_like(values)


def _bytes(entry: Entry) -> int:
    return math.prod(entry[2]) * DTYPES[entry[1]].itemsize


def _split(entries: list[Entry], max_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + _bytes(entry) > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += _bytes(entry)
    return shards


def _write(stream: BinaryIO, shard: list[Entry], tensors: Iterator[np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        name, dtype, shape = entry
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + _bytes(entry)],
        }
        offset += _bytes(entry)
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data are aligned in a mapped file
    stream.write(len(raw).to_bytes(8, "little") + raw)
    for _ in shard:
        tensor = next(tensors)
        contiguous = np.empty(tensor.shape, tensor.dtype)
        copy_cast(contiguous, tensor)
        stream.write(contiguous.reshape(-1).view(np.uint8).data)
    stream.flush()
    os.fsync(stream.fileno())


def _write_index(folder: Path, names: list[str], shards: list[list[Entry]]) -> None:
    index = {
        "metadata": {"total_size": sum(_bytes(entry) for shard in shards for entry in shard)},
        "weight_map": {entry[0]: name for name, shard in zip(names, shards, strict=True) for entry in shard},
    }
    path = folder / f"{INDEX_FILE}.tmp-{os.getpid()}"
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(path, folder / INDEX_FILE)
