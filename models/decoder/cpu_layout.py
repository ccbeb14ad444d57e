"""Parameters arranged for decoding on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp

_FUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"qkv": ("query", "key", "value")},
    "mlp": {"gate_up": ("gate", "up")},
}


def cpu_layout(params: dict[str, Any]) -> dict[str, Any]:
    """The same parameters with the decoder's layers as a tuple of trees, and projections of one input as one matrix.

    From stacked layers XLA's CPU backend copies the weights of each layer before it multiplies with them, at every
    decoded token, and each product costs a fixed time; a step takes half as long with this layout. Tied embeddings get
    a transposed copy for the output, since a product with the table as it lies takes several times as long. The price
    is a program that grows with the number of layers, and so does its compile time. On accelerators, on a mesh and for
    training leave the parameters as `load` gives them.

    Args:
      params: of a model, layers stacked. They are copied, once; drop the old ones to have the memory back.

    Returns:
      Parameters for `generate`, `prefill`, `decode_step` and `stream`; tokens are the same.
    """
    decoder = params["decoder"]
    count = len(jax.tree.leaves(decoder["layers"])[0])
    layers = tuple(_fuse(jax.tree.map(lambda x: x[i], decoder["layers"])) for i in range(count))  # noqa: B023
    head = decoder.get("lm_head") or {"kernel": decoder["embed_tokens"]["embedding"].T}
    return {**params, "decoder": {**decoder, "layers": layers, "lm_head": head}}


def _fuse(layer: dict[str, Any]) -> dict[str, Any]:
    layer = dict(layer)
    for block, groups in _FUSED.items():
        projections = dict(layer[block])
        for name, members in groups.items():
            parts = [projections.pop(member) for member in members]
            projections[name] = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *parts)
        layer[block] = projections
    return layer
