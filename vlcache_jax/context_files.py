"""Compressed contexts in files: one safetensors file each, checked against the model before anything is used.

The metadata hold one JSON text under `FORMAT`: the version, what the model must be, and what cannot be read off the
tensors. Tensors are named by their place in the context, such as `stores.0.keys`. Files may come from others: nothing
in them is run, and every size, offset and position is checked.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NoReturn, get_args

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax import ops
from vlcache_jax.budgets import Budget
from vlcache_jax.context import Context
from vlcache_jax.errors import CheckpointError, InputError, PolicyError
from vlcache_jax.interfaces import ModelSpec, Params, VisionLanguageModel
from vlcache_jax.kernels.quantisation import scales_width
from vlcache_jax.models.checkpoint.safetensors_reader import read_header
from vlcache_jax.ops import on_mesh_of
from vlcache_jax.report import Report
from vlcache_jax.state import ALIGNMENT, PackedStore

FORMAT = "vlcache_jax.context"
VERSION = 1

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FIELDS = [field.name for field in dataclasses.fields(PackedStore)]
_REPORT = (
    "kept",
    "prompt_lengths",
    "density",
    "exact",
    "kept_fraction",
)  # arrays; the rest of a report is in the metadata
_COUNTS = ("state_bytes", "full_bytes", "tail_bytes")
_SAMPLES = 64  # numbers of each parameter that the fingerprint reads


def save_context(ctx: Context, path: str | os.PathLike[str]) -> None:
    """Writes a context, without the model's parameters, to one file.

    It is written beside its final name and renamed at the end, so a crash never leaves half a file.

    Args:
      ctx: from `compress` or `extend`.
      path: of the file; its folder must exist.

    Raises:
      InputError: the file cannot be written.

    Example:
      vlc.save_context(ctx, "manual.safetensors")
    """
    path = Path(path)
    arrays = {f"stores.{i}.{name}": getattr(s, name) for i, s in enumerate(ctx.stores) for name in _FIELDS}
    arrays |= {"next_position": ctx.next_position, "logits": ctx.logits}
    arrays |= {f"report.{name}": getattr(ctx.report, name) for name in _REPORT}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    description = {
        "version": VERSION,
        "model": _describe(ctx.model.spec, ctx.params),
        "stores": len(ctx.stores),
        "room": ctx.room,
        "policy": ctx.report.policy,
        "budget": _budget_to_json(ctx.report.budget),
        **{name: getattr(ctx.report, name) for name in _COUNTS},
    }
    header: dict[str, Any] = {"__metadata__": {FORMAT: json.dumps(description, sort_keys=True)}}
    offset = 0
    for name, x in arrays.items():
        dtype = np.dtype(x.dtype)
        end = offset + x.size * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(x.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data are aligned in a mapped file
    unfinished = Path(f"{path}.tmp-{os.getpid()}")
    try:
        with unfinished.open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            for x in arrays.values():  # one at a time comes to the host
                stream.write(np.ascontiguousarray(jax.device_get(x)).reshape(-1).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"the context cannot be written to {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_context(path: str | os.PathLike[str], model: VisionLanguageModel, params: Params) -> Context:
    """Reads a context that `save_context` wrote, for the same model, dtype and parameters.

    Args:
      path: the file.
      model: the model it was made with.
      params: its parameters, arranged as they were then. (A context made with other arrangements of the same numbers,
        by `cpu_layout` say, is loaded with the old one; then `dataclasses.replace(ctx, params=...)`.)

    Returns:
      The context; on the mesh of the parameters, if they lie on one.

    Raises:
      InputError: a context of another model, dtype or other parameters; both sides are named.
      CheckpointError: not such a file, of another version, corrupt, or with sizes or places that cannot be.

    Example:
      ctx = vlc.load_context("manual.safetensors", vlm.model, vlm.params)
    """
    path = Path(path)
    infos, metadata = read_header(path)
    described = _description(path, metadata)
    _check_model(path, described, model.spec, params)
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    arrays = {}
    for info in infos:
        if info.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: tensor {info.name!r} has dtype {info.dtype}, which no context holds")
        arrays[info.name] = np.asarray(data[info.start : info.stop]).view(_DTYPES[info.dtype]).reshape(info.shape)
    return _Reader(path, described, arrays, model, params).context()


class _Reader:
    """Takes a context out of untrusted tensors."""

    def __init__(
        self,
        path: Path,
        described: dict[str, Any],
        arrays: dict[str, np.ndarray],
        model: VisionLanguageModel,
        params: Params,
    ) -> None:
        self.path, self.described, self.arrays = path, described, arrays
        self.model, self.params, self.spec = model, params, model.spec

    def context(self) -> Context:
        next_position = self.take("next_position", "int32", (None,))
        rows = len(next_position)
        self.require(rows > 0, "next_position has no rows")
        self.within("next_position", next_position, 1, self.spec.max_positions)
        logits = self.take("logits", "float32", (rows, None))
        self.require(logits.shape[1] > 0 and bool(np.isfinite(logits).all()), "logits are not finite")
        count, room = self.count("stores"), self.count("room")
        self.require(1 <= count <= len(self.arrays), f"it claims {count} stores")
        stores = tuple(self.store(i, rows) for i in range(count))
        if room:
            self.check_room(stores[-1], room, rows)
        report = self.report(rows)
        self.require(not self.arrays, f"tensors {sorted(self.arrays)[:4]} have no place in a context")
        with on_mesh_of(self.params):
            stores = _place(stores)
        return Context(self.model, self.params, stores, jnp.array(next_position), jnp.array(logits), report, room=room)

    def store(self, number: int, rows: int) -> PackedStore:
        def take(name: str, dtype: str, *shape: int | None) -> np.ndarray:
            return self.take(f"stores.{number}.{name}", dtype, shape)

        where, spec = f"stores.{number}", self.spec
        found = self.arrays.get(f"{where}.keys")
        quantised = found is not None and found.dtype == np.int8
        dtype = "int8" if quantised else jnp.dtype(spec.dtype).name
        keys = take("keys", dtype, None, None, None, spec.head_dim)
        own, lanes, byte_rows, head_dim = keys.shape
        self.require(min(keys.shape) > 0 and rows % own == 0, f"{where} has {own} rows for a context of {rows}")
        self.require(spec.num_kv_heads % lanes == 0, f"{where} has {lanes} lanes for {spec.num_kv_heads} KV heads")
        arrays = {"keys": keys, "values": take("values", dtype, *keys.shape)}
        slots, alignment = byte_rows, ALIGNMENT
        if quantised:
            scales = take("value_scales", "float32", own, lanes, 2, None)
            slots, alignment = scales.shape[3], 32 * scales.shape[3] // byte_rows
            fits = byte_rows % 32 == 0 and slots in (byte_rows, 2 * byte_rows, 4 * byte_rows)
            self.require(fits, f"{where}.value_scales are for {slots} slots in {byte_rows} rows of codes")
            arrays["value_scales"] = scales
            arrays["key_scales"] = take("key_scales", "float32", own, lanes, byte_rows // 32, 2, scales_width(head_dim))
            channels = f"{where}.value_channels"
            if channels in self.arrays:
                of_heads = (own, spec.num_layers, spec.num_kv_heads, head_dim)
                arrays["value_channels"] = take("value_channels", "float32", *of_heads)
                finite = np.isfinite(arrays["value_channels"]).all()
                self.require(bool(finite), f"{channels} are not finite")
        arrays["positions"] = take("positions", "int32", own, lanes, slots)
        self.within(f"{where}.positions", arrays["positions"], -1, spec.max_positions - 1)
        offsets = take("offsets", "int32", own, spec.num_layers, None)
        heads = offsets.shape[2]
        fits = heads == spec.num_kv_heads or (heads == 1 and lanes == spec.num_kv_heads)
        self.require(fits, f"{where} has segments of {heads} heads for {spec.num_kv_heads} KV heads in {lanes} lanes")
        lengths = take("lengths", "int32", *offsets.shape)
        self.within(f"{where}.offsets", offsets, 0, slots)
        self.within(f"{where}.lengths", lengths, 0, slots)
        self.require(bool((offsets % alignment == 0).all()), f"{where}.offsets are not multiples of {alignment}")
        self.within(f"{where}: ends of segments", offsets.astype(np.int64) + lengths, 0, slots)
        return PackedStore(
            **{name: jnp.array(x) for name, x in (arrays | {"offsets": offsets, "lengths": lengths}).items()}
        )

    def check_room(self, store: PackedStore, room: int, rows: int) -> None:
        layers = self.spec.num_layers
        offsets, lengths = np.asarray(store.offsets), np.asarray(store.lengths)
        fits = (
            room % ALIGNMENT == 0
            and store.key_scales is None
            and store.keys.shape[0] == rows
            and layers * room <= store.keys.shape[2]
            and offsets.shape[2] == 1
            and bool((offsets[..., 0] == room * np.arange(layers)).all())
            and bool((lengths == lengths[:, :1]).all())
            and int(lengths.max()) <= room
        )
        self.require(fits, f"its last store does not have room for {room} appended tokens a layer")

    def report(self, rows: int) -> Report:
        kept = self.take("report.kept", "int32", (None, self.spec.num_layers))
        size = len(kept)
        self.require(size > 0 and rows % size == 0, f"its report has {size} rows for a context of {rows}")
        lengths = self.take("report.prompt_lengths", "int32", (size,))
        self.within("report.prompt_lengths", lengths, 1, self.spec.max_positions)
        self.within("report.kept", kept, 0, self.spec.max_positions)
        density = self.take("report.density", "float32", kept.shape)
        exact = self.take("report.exact", "bool", (size,))
        fraction = self.take("report.kept_fraction", "float32", (size,))
        policy = self.described.get("policy")
        if not isinstance(policy, str):
            self.fail(f"its policy is {policy!r}")
        budget = self.budget(self.described.get("budget"))
        counts: dict[str, Any] = {name: self.count(name) for name in _COUNTS}
        arrays: dict[str, Any] = dict(
            zip(_REPORT, map(jnp.array, (kept, lengths, density, exact, fraction)), strict=True)
        )
        return Report(**arrays, policy=policy, budget=budget, **counts)

    def budget(self, value: Any) -> Budget:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        known: Any = [kind for kind in get_args(Budget) if dataclasses.is_dataclass(kind)]
        kinds = {kind.__name__: kind for kind in known}
        if isinstance(value, dict) and value.get("kind") in kinds:
            try:
                return kinds[value["kind"]](**{name: x for name, x in value.items() if name != "kind"})
            except (TypeError, PolicyError) as error:
                self.fail(f"its budget is {value!r} ({error})")
        self.fail(f"its budget is {value!r}")

    def take(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """Removes a tensor from those left; None in `shape` stands for any size."""
        x = self.arrays.pop(name, None)
        if x is None:
            self.fail(f"tensor {name!r} is missing")
        fits = len(x.shape) == len(shape) and all(want in (None, size) for size, want in zip(x.shape, shape))
        if not fits or x.dtype != jnp.dtype(dtype):
            wanted = "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
            self.fail(f"tensor {name!r} is {x.dtype} {list(x.shape)}, not {dtype} {wanted}")
        return x

    def count(self, name: str) -> int:
        value = self.described.get(name)
        if type(value) is not int or value < 0:
            self.fail(f"its {name} is {value!r}, not a number")
        return value

    def within(self, name: str, x: np.ndarray, low: int, high: int) -> None:
        if x.size and (x.min() < low or x.max() > high):
            self.fail(f"{name} reach from {x.min()} to {x.max()}, beyond {low} to {high}")

    def require(self, fits: bool, why: str) -> None:
        if not fits:
            self.fail(why)

    def fail(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.path} is not a valid context: {why}; save it again")


def _description(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    text = metadata.get(FORMAT)
    if not isinstance(text, str):
        raise CheckpointError(f"{path} holds no context: its metadata lack {FORMAT!r}; give a file of save_context")
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a valid context: its description is not JSON ({error})") from error
    if not isinstance(described, dict) or described.get("version") != VERSION:
        version = described.get("version") if isinstance(described, dict) else None
        raise CheckpointError(
            f"{path} is a context of format version {version!r}, this library reads version {VERSION}: compress the "
            "prompt again, or use the release of vlcache_jax that saved it"
        )
    return described


def _check_model(path: Path, described: dict[str, Any], spec: ModelSpec, params: Params) -> None:
    theirs, ours = described.get("model"), _describe(spec, params)
    theirs = theirs if isinstance(theirs, dict) else {}
    different = [name for name in ours if theirs.get(name) != ours[name]]
    if not different:
        return
    if different != ["parameters"]:  # other sizes have other parameters, of course
        different = [name for name in different if name != "parameters"]

    def side(values: dict[str, Any]) -> str:
        return ", ".join(f"{name}={str(values.get(name))[:40]}" for name in different)

    raise InputError(
        f"{path} was saved for a model with {side(theirs)}, but this model has {side(ours)}: load the context with the "
        "model, dtype and parameters that made it, or compress the prompt again"
    )


def _describe(spec: ModelSpec, params: Params) -> dict[str, Any]:
    """What a model must be to go on from a context."""
    sizes = {name: getattr(spec, name) for name in ("num_layers", "num_kv_heads", "head_dim", "max_positions")}
    return {**sizes, "dtype": jnp.dtype(spec.dtype).name, "parameters": _fingerprint(params)}


def _fingerprint(params: Params) -> str:
    """Names, shapes and types of all parameters and some numbers of each, hashed."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    with on_mesh_of(params):
        samples = jax.device_get(_sampled([leaf for _, leaf in leaves]))
    digest = hashlib.sha256()
    for (path, leaf), numbers in zip(leaves, samples, strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {tuple(leaf.shape)}".encode())
        digest.update(np.ascontiguousarray(numbers).tobytes())
    return digest.hexdigest()


@jax.jit
def _sampled(leaves: list[jax.Array]) -> list[jax.Array]:
    def sample(x: jax.Array) -> jax.Array:
        where = np.arange(_SAMPLES, dtype=np.uint64) * 2_654_435_761 % max(1, x.size)  # Knuth's multiplicative hash
        return jnp.asarray(x)[np.unravel_index(where.astype(np.int64), x.shape)] if x.ndim else jnp.asarray(x)

    return [sample(x) for x in leaves]


@jax.jit
def _place(stores: tuple[PackedStore, ...]) -> tuple[PackedStore, ...]:
    """On a mesh, where the ops expect them."""
    names = [name for name in _FIELDS if name not in ("offsets", "lengths", "value_channels")]

    def split(store: PackedStore) -> PackedStore:
        buffers = {name: getattr(store, name) for name in names}
        return dataclasses.replace(store, **{name: ops.split(x) for name, x in buffers.items() if x is not None})

    return tuple(split(store) for store in stores)


def _budget_to_json(budget: Budget) -> Any:
    if dataclasses.is_dataclass(budget):
        return {"kind": type(budget).__name__, **dataclasses.asdict(budget)}
    return budget
