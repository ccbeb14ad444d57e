"""The way through a model: embeddings, the layers with somebody's attention, logits of each row's last token."""

from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.typing import Embedded, Params, VisionLanguageModel


def embed_prompt(model: VisionLanguageModel, params: Params, batch: Any) -> Embedded:
    """The prompts of a `Batch`."""
    return model.apply({"params": params}, batch, method="embed")


def embed_text(
    model: VisionLanguageModel, params: Params, tokens: jax.Array, position: jax.Array, lengths: jax.Array
) -> Embedded:
    """Text that goes on at `position` i32 [batch]: tokens i32 [batch, length], of which `lengths` [batch] count.

    Text is in no block: what is said behind a prompt sees nothing after itself, whatever the model's images do.
    """
    hidden = model.apply({"params": params}, tokens, method="embed_tokens")
    steps = jnp.minimum(jax.lax.iota(jnp.int32, tokens.shape[1])[None], lengths[:, None] - 1)
    return Embedded(hidden, position[:, None] + steps, position + lengths)


def run_layers(
    model: VisionLanguageModel,
    params: Params,
    embedded: Embedded,
    lengths: jax.Array,
    attend: Any,
    carry: Any = None,
    xs: Any = None,
) -> tuple[jax.Array, Any, Any]:
    """(logits of the token behind each row's last one f32 [batch, vocab], the last layer's carry, ys of all layers).

    Args:
      embedded: from `embed_prompt` or `embed_text`.
      lengths: i32 [batch], tokens of each row.
      attend, carry, xs: see `models.decoder.decoder`.
    """
    variables, more = {"params": params}, {}
    if embedded.layer_inputs is not None:
        more["layer_inputs"] = embedded.layer_inputs
    hidden, carry, ys = model.apply(
        variables, embedded.hidden, embedded.positions, attend, carry, xs, method="decode", **more
    )
    if hidden.shape[1] > 1:
        hidden = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    return model.apply(variables, hidden[:, 0], method="unembed"), carry, ys
