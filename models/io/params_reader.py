"""Loading a checkpoint folder into the parameter tree, each device reading only its own part."""

import dataclasses
import difflib
import gc
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.safetensors import FLOATS, copy_cast
from vlcache_jax.models.coding import CODED, WeightCoding
from vlcache_jax.models.decoder.layout import Part, parts
from vlcache_jax.models.io.coding_weights import Coder
from vlcache_jax.models.io.files import Folder
from vlcache_jax.models.io.packed.folder import Tensors, open_weights
from vlcache_jax.models.io.packed.scheme import Scheme
from vlcache_jax.models.io.rules import WeightRules
from vlcache_jax.models.io.unsupported import refuse_quantised_tensors, warn_of_adapter

_ALIGNMENT = 64  # bytes
_LISTED = 20  # problems of one kind that a message spells out
_COMPARED = 200  # names that are searched for one like another


def load_params(
    folder: Folder,
    abstract_params: dict[str, Any],
    weights: WeightRules,
    dtype: Any = None,
    shardings: Any = None,
    arranged: dict[str, Any] | None = None,
    coding: WeightCoding | None = None,
    scheme: Scheme | None = None,
    exact: bool = False,
) -> dict[str, Any]:
    """Reads the parameters of a checkpoint that transformers (4 or 5) or `save_params` wrote.

    Every tensor is checked before any data is read. Data are read tensor by tensor, straight from the
    mapped files into each device's shard: the host never holds more than one parameter (stacked over
    layers) beyond what the devices do.

    Args:
      folder: With `model.safetensors`, or `model.safetensors.index.json` and its shards. A path, or what
        `checkpoint_folder` made of one.
      abstract_params: The tree to fill, with `jax.ShapeDtypeStruct` leaves; `jax.eval_shape` of the model's
        `init`.
      weights: Which tensor is which parameter, `Family.weights`.
      dtype: Of the returned arrays; None takes each leaf's own from `abstract_params`.
      shardings: A tree like the one returned with a `jax.sharding.Sharding` at each leaf, or one for all
        leaves. None puts everything on the default device.
      arranged: The tree to return, where the decoder's weights shall lie in another layout (`decoder.layout`) or be
        coded.
      coding: Of the codes in it.
      scheme: How the folder's weights are packed, if they are.
      exact: Only the folder's own codes are taken; no weight is coded here.

    Returns:
      Nested dict like `arranged`, or else `abstract_params`, with `jax.Array` leaves.

    Raises:
      CheckpointError: if files are missing, unsafe or corrupt, or the tensors do not fit; that message lists
        everything that does not fit.
    """
    reader = open_weights(folder, scheme)
    warn_of_adapter(reader.folder)
    wanted = traverse_util.flatten_dict(abstract_params)
    sources = _match(reader, wanted, weights)
    target = wanted if arranged is None else traverse_util.flatten_dict(arranged)
    tied = ("decoder", "lm_head", "kernel") not in wanted
    coder = None if coding is None else Coder(reader, coding, exact)

    def piece(part: Part) -> "_Piece":
        kind, path = "", part.path
        if coding is not None and path[-1] in CODED:
            kind, path = path[-1], (*path[:-1], "kernel")
            assert coder is not None
            coder.check(sources[path])
        rule, names, shape = weights.by_path[path], sources[path], wanted[path].shape
        if part.layer is not None:
            return _Piece([names[part.layer]], rule.axes, False, shape[-1], kind)
        if kind:
            return _Piece(names, rule.axes, True, shape[-1], kind)
        axes = (1, 0) if part.transposed else rule.axes
        return _Piece(names, axes, rule.per_layer, shape[0 if part.transposed else -1])

    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        one = shardings or jax.sharding.SingleDeviceSharding(default_device())
        placed = dict.fromkeys(target, one)
    else:
        placed = traverse_util.flatten_dict(shardings)
        if missing := target.keys() - placed.keys():
            raise ValueError(f"shardings lacks {sorted('/'.join(path) for path in missing)[:_LISTED]}")

    pieces_of = {path: [piece(part) for part in parts(path, tied)] for path in target}
    params = {}
    for path, leaf in target.items():
        pieces = pieces_of[path]
        element = np.dtype(leaf.dtype if dtype is None or pieces[0].kind else dtype)
        read = _callback(reader, coder, pieces, leaf.shape, element)
        params[path] = jax.make_array_from_callback(leaf.shape, placed[path], read).block_until_ready()
        # JAX lets go of a transferred host buffer at its next chance, which would come after the next one is
        # filled; a (cheap, youngest-generation) collection is such a chance.
        del read
        gc.collect(0)
    return traverse_util.unflatten_dict(params)


def default_device() -> jax.Device:
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Tensors that are a parameter, or a part of its last axis: stacked over layers, or a single one."""

    names: list[str]
    axes: tuple[int, ...] | None
    stacked: bool
    width: int
    kind: str = ""  # "codes", say, of a weight that is to be coded


def _match(
    reader: Tensors, wanted: dict[tuple[str, ...], jax.ShapeDtypeStruct], weights: WeightRules
) -> dict[tuple[str, ...], list[str]]:
    """The checkpoint's tensor names for each parameter, in layer order; one error for all that is wrong."""
    unknown, misshapen, unreadable, twice = [], [], [], []
    found: dict[tuple[str, ...], dict[int, str]] = {path: {} for path in wanted}
    tied_head = None
    for name, info in sorted(reader.tensors.items()):
        pattern, layer = weights.canonical(name)
        rule = weights.by_name.get(pattern)
        if pattern in weights.ignored:
            continue
        if rule is not None and rule.path == ("decoder", "lm_head", "kernel") and rule.path not in wanted:
            tied_head = name  # a redundant copy of the embeddings; compared below
            continue
        if rule is None or rule.path not in wanted:
            unknown.append(name if rule is None else f"{name} (the config describes a model without it)")
            continue
        shape = wanted[rule.path].shape
        if rule.per_layer:
            assert layer is not None
            if layer >= shape[0]:
                if rule.path[0] not in weights.shortened:
                    unknown.append(f"{name} (the config describes {shape[0]} layers)")
                continue
            shape = shape[1:]
        if info.shape != rule.theirs(shape):
            expected = list(rule.theirs(shape))
            misshapen.append(f"{name}: the config gives {expected}, the file has {list(info.shape)}")
        if info.dtype not in FLOATS:
            unreadable.append(f"{name}: {info.dtype}")
        other = found[rule.path].setdefault(layer or 0, name)
        if other != name and not reader.same_bytes(reader.tensors[other], info):
            twice.append(f"{other} and {name}")

    missing = []
    for path, names in found.items():
        rule = weights.by_path.get(path)
        if rule is None:
            raise ValueError(f"no checkpoint rule fills the parameter {'/'.join(path)}")
        layers = range(wanted[path].shape[0]) if rule.per_layer else [0]
        missing += [rule.name.format(layer=i) for i in layers if i not in names]

    problems = [
        *_listing("missing tensors", missing),
        *_listing("tensors that belong to no parameter", unknown),
        *_listing("tensors of the wrong shape", misshapen),
        *_listing(f"tensors of an unsupported dtype (convert them to one of {', '.join(FLOATS)})", unreadable),
        *_listing("tensors present twice, with different values", twice),
    ]
    if problems:
        refuse_quantised_tensors(reader.folder, unknown)
        hint = ""
        if missing and unknown:
            near = difflib.get_close_matches(missing[0], unknown[:_COMPARED], n=1)
            hint = f"\n  ({missing[0]} may be what the file calls {near[0]})" if near else ""
        raise CheckpointError(
            f"the tensors in {reader.folder} do not fit its config.json:\n  " + "\n  ".join(problems) + hint
        )
    if tied_head is not None:
        _check_tied(reader, tied_head, found[("decoder", "embed_tokens", "embedding")][0])
    return {path: [name for _, name in sorted(names.items())] for path, names in found.items()}


def _listing(title: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = [f"  ... and {len(items) - _LISTED} more"] if len(items) > _LISTED else []
    return [f"{len(items)} {title}:", *(f"  {item[:300]}" for item in items[:_LISTED]), *more]


def _check_tied(reader: Tensors, head: str, embedding: str) -> None:
    a, b = reader.view(head), reader.view(embedding)
    if a.shape != b.shape or not np.array_equal(a, b):
        raise CheckpointError(
            f"config.json of {reader.folder} ties the output head to the embeddings "
            f"(tie_word_embeddings), but {head} and {embedding} differ; set tie_word_embeddings to false"
        )


def _callback(
    reader: Tensors, coder: Coder | None, pieces: list[_Piece], shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[Any], np.ndarray]:
    """What `jax.make_array_from_callback` calls for each device: an index of the parameter -> its data."""

    def take(piece: _Piece, number: int, cut: tuple[slice, ...]) -> np.ndarray:
        name = piece.names[number]
        if piece.kind:
            assert coder is not None
            return coder.read(piece.kind, name, *cut)
        tensor = reader.view(name)
        return (tensor if piece.axes is None else tensor.transpose(piece.axes))[cut]

    read: dict[Any, np.ndarray] = {}  # replicas ask for the same part again

    def callback(index: tuple[slice, ...] | None) -> np.ndarray:
        slices = tuple(s.indices(n) for s, n in zip(index or (slice(None),) * len(shape), shape, strict=True))
        if slices not in read:
            out = _aligned([len(range(*s)) for s in slices], dtype)
            filled = out.view(np.int8) if dtype == jnp.int4 else out  # a byte holds each; casts are slow
            cut = tuple(slice(*s) for s in slices)
            first, last = (cut[-1].start, cut[-1].stop) if cut else (0, 0)
            begin = 0
            for piece in pieces:
                here = filled
                if len(pieces) > 1:  # what of this one lies in the part that was asked for
                    low, high = max(first, begin), max(min(last, begin + piece.width), max(first, begin))
                    here, cut = filled[..., low - first : high - first], (*cut[:-1], slice(low - begin, high - begin))
                    begin += piece.width
                if piece.stacked:
                    for row, layer in enumerate(range(*slices[0])):
                        copy_cast(here[row], take(piece, layer, cut[1:]))
                else:
                    copy_cast(here, take(piece, 0, cut))
            read[slices] = out
        return read[slices]

    return callback


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX takes for its own on a CPU, where it copies those that begin elsewhere."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
