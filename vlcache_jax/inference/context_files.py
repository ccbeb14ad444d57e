"""Compressed contexts in files: one file each, checked against the model before anything is used.

The format is that of `tensor_files`. Arrays are named by their place in the context, such as `stores.0.keys`; the
description says what the model must be, and what cannot be read off the arrays. Files may come from others: every size,
offset, position and number is checked (`context_reader`).
"""

import dataclasses
import hashlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import InputError
from vlcache_jax.files.tensor_files import Kind, TensorFile, write_tensor_file
from vlcache_jax.inference.context import Context
from vlcache_jax.inference.context_reader import COUNTS, FIELDS, REPORT, ContextReader, can_be_saved
from vlcache_jax.inference.finiteness import require_finite
from vlcache_jax.parallel.mesh import check_known, on_mesh_of
from vlcache_jax.typing import ModelSpec, Params, VisionLanguageModel

_SINCE = "the precision of each store and the tokens of each stage"
KIND = Kind("vlcache_jax.inference.context", "context", 6, "compress the prompt and save it again", _SINCE)
_SAMPLES = 64  # numbers of each parameter that the fingerprint reads


def save_context(ctx: Context, path: str | os.PathLike[str]) -> None:
    """Writes a context, without the model's parameters, to one file.

    The file appears under its name when it is complete, so a crash never leaves half a file. Every array has a
    checksum.

    Args:
      ctx: from `compress` or `extend`.
      path: of the file; its folder must exist. A file that is there is replaced, but no link, folder or device.

    Raises:
      InputError: the file cannot be written, the rule for generated tokens rewrites the context, or parts of it lie
        with other processes.
      NonFiniteError: the context's logits or scores are not finite.

    Example:
      vlc.save_context(ctx, "manual.safetensors")
    """
    if not can_be_saved(ctx.decoding):
        raise InputError(
            f"policy {ctx.report.policy!r} has the rule decoding={ctx.decoding}, which rewrites what was kept: a file "
            "holds contexts of Append() and RollingWindow() alone"
        )
    require_finite(ctx.report.finite, ctx, dtype=ctx.model.spec.dtype, density=ctx.report.density)
    arrays = {f"stores.{i}.{name}": getattr(s, name) for i, s in enumerate(ctx.stores) for name in FIELDS}
    arrays |= {"next_position": ctx.next_position, "next_index": ctx.next_index, "logits": ctx.logits}
    arrays |= {f"report.{name}": getattr(ctx.report, name) for name in REPORT}
    for name, x in arrays.items():
        check_known(x, f"{name} of the context")
    description = {
        "model": _describe(ctx.model.spec, ctx.params),
        "stores": [store.bits for store in ctx.stores],
        "room": ctx.room,
        "policy": ctx.report.policy,
        "budget": _to_json(ctx.report.budget),
        "decoding": _to_json(ctx.decoding),
        **{name: getattr(ctx.report, name) for name in COUNTS},
    }
    write_tensor_file(path, KIND, description, {name: x for name, x in arrays.items() if x is not None})


def load_context(path: str | os.PathLike[str], model: VisionLanguageModel, params: Params) -> Context:
    """Reads a context that `save_context` wrote, for the same model, dtype and parameters.

    Args:
      path: the file.
      model: the model it was made with.
      params: its parameters, arranged as they were then. (A context made with other arrangements of the same numbers,
        by `VLM.with_layout` say, is loaded with the old one; then `dataclasses.replace(ctx, params=...)`.)

    Returns:
      The context; on the mesh of the parameters, if they lie on one.

    Raises:
      InputError: a context of another model, dtype or other parameters; both sides are named.
      CheckpointError: not such a file, of another version, damaged, or with numbers, sizes or places that cannot be.

    Example:
      ctx = vlc.load_context("manual.safetensors", vlm.model, vlm.params)
    """
    file = TensorFile.open(path, KIND)
    _check_model(file, model.spec, params)
    return ContextReader(file, model, params).context()


def _check_model(file: TensorFile, spec: ModelSpec, params: Params) -> None:
    theirs, ours = file.description.get("model"), _describe(spec, params)
    theirs = theirs if isinstance(theirs, dict) else {}
    different = [name for name in ours if theirs.get(name) != ours[name]]
    if not different:
        return
    if different != ["parameters"]:  # other sizes have other parameters, of course
        different = [name for name in different if name != "parameters"]

    def side(values: dict[str, Any]) -> str:
        return ", ".join(f"{name}={str(values.get(name))[:40]}" for name in different)

    raise InputError(
        f"{file.path} was saved for a model with {side(theirs)}, but this model has {side(ours)}: load the context "
        "with the model, dtype and parameters that made it, or compress the prompt again"
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


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **dataclasses.asdict(value)}
    return value
