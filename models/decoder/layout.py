"""How the weights of a decoder lie, and how they are brought from one layout to another."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from vlcache_jax.errors import InputError

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the weights of a decoder lie.

    Attributes:
      layers_apart: each layer has its own arrays, "layers_0", "layers_1" ...; otherwise all layers are stacked, for a
        scan.
      fused: projections of one input are one matrix.
      own_head: tied embeddings have a transposed copy for the output.
    """

    layers_apart: bool = False
    fused: bool = False
    own_head: bool = False


LAYOUTS = {"stacked": Layout(), "apart": Layout(layers_apart=True, fused=True, own_head=True)}
"""By name. "stacked" is for TPUs, meshes, training and checkpoints.

"apart" is for inference on one CPU or GPU. From stacked layers XLA's backends for both copy the weights of each layer
before they multiply with them, at every decoded token, and each product costs a fixed time; a step takes half as long
with this layout. On a CPU a product with a table of embeddings as it lies takes several times as long as one with its
transposed copy. The price is a program that grows with the number of layers, and so does its compile time. Tokens are
the same.
"""

_FUSED = (("query", "key", "value"), ("gate", "up"))
_TABLE, _HEAD = ("decoder", "embed_tokens", "embedding"), ("decoder", "lm_head", "kernel")
_LAYERS = ("decoder", "layers")


@dataclasses.dataclass(frozen=True)
class Part:
    """What a parameter takes from the stacked layout: all of one, or one layer of it, or its transpose."""

    path: Path
    layer: int | None = None
    transposed: bool = False


def layout_of(name: str) -> Layout:
    """The layout called `name`. Raises InputError, naming the known ones, if there is none."""
    if name not in LAYOUTS:
        raise InputError(f"layout={name!r} is not known: use one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def parts(path: Path, tied: bool) -> list[Part]:
    """Of which stacked parameters one of any layout is made: joined along their last axis.

    Args:
      path: of a parameter in its layout.
      tied: whether the output head is the embedding table.
    """
    if path == _HEAD and tied:
        return [Part(_TABLE, transposed=True)]
    if path[0] != "decoder" or not path[1].startswith("layers_"):
        return [Part(path)]
    layer, rest = int(path[1].removeprefix("layers_")), path[2:]
    members = next((names for names in _FUSED if len(rest) > 1 and rest[-2] == "_".join(names)), rest[-2:-1])
    return [Part((*_LAYERS, *rest[:-2], name, rest[-1]), layer) for name in members]


def relaid(params: dict[str, Any], model: Any, layout: str) -> tuple[Any, dict[str, Any]]:
    """(model, parameters) with the decoder's weights in another layout; arrays that it does not change are shared.

    Args:
      params: of `model`.
      model: a `FamilyModule`.
      layout: a key of `LAYOUTS`.

    Raises:
      InputError: an unknown layout, or parameters that hold adapters.
    """
    layout_of(layout)
    if any(path[-1] in ("lora_a", "lora_b") for path in traverse_util.flatten_dict(params)):
        raise InputError("the parameters hold adapters, which lie beside stacked weights only: merge them first")
    new, plain = (dataclasses.replace(model, layout=name) for name in (layout, "stacked"))
    shapes, tied = plain.abstract_params(), model.config.decoder.tie_embeddings
    plainly = stacked(params, shapes, tied)
    return new, plainly if new == plain else arranged(plainly, new.abstract_params(), tied)


def arranged(stacked: dict[str, Any], shapes: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Stacked parameters in another layout; arrays that it does not change are the same.

    Args:
      stacked: the parameters.
      shapes: the tree to make, `abstract_params()` of the model with the wanted layout.
      tied: whether the output head is the embedding table.
    """
    flat = traverse_util.flatten_dict(stacked)

    def take(part: Part) -> jax.Array:
        leaf = flat[part.path] if part.layer is None else flat[part.path][part.layer]
        return leaf.T if part.transposed else leaf

    def make(path: Path) -> jax.Array:
        taken = [take(part) for part in parts(path, tied)]
        return taken[0] if len(taken) == 1 else jnp.concatenate(taken, axis=-1)

    return traverse_util.unflatten_dict({path: make(path) for path in traverse_util.flatten_dict(shapes)})


def stacked(params: dict[str, Any], shapes: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The inverse of `arranged`: `params`, whatever their layout, as stacked ones of these shapes."""
    flat, wanted = traverse_util.flatten_dict(params), traverse_util.flatten_dict(shapes)
    layers: dict[Path, dict[int, jax.Array]] = {}
    found: dict[Path, jax.Array] = {}
    for path, leaf in flat.items():
        members, start = parts(path, tied), 0
        for part in members:
            if part.transposed:
                continue
            size = wanted[part.path].shape[-1] if len(members) > 1 else leaf.shape[-1]
            piece = leaf[..., start : start + size] if len(members) > 1 else leaf
            start += size
            if part.layer is None:
                found[part.path] = piece
            else:
                layers.setdefault(part.path, {})[part.layer] = piece
    found |= {path: jnp.stack([of_layer[i] for i in sorted(of_layer)]) for path, of_layer in layers.items()}
    order = [*(path for path in wanted if path in found), *sorted(found.keys() - wanted.keys())]
    return traverse_util.unflatten_dict({path: found[path] for path in order})
