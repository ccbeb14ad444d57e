"""The way through a model: embeddings, the layers with somebody's attention, logits of each row's last token."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.pruning.method import Between
from vlcache_jax.pruning.plan import Plan
from vlcache_jax.pruning.stage import Stage
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
    attend: Any,
    carry: Any = None,
    xs: Any = None,
) -> tuple[jax.Array, Any, Any]:
    """(what logits are made of [batch, length, hidden], the last layer's carry, ys of all layers).

    Args:
      embedded: from `embed_prompt` or `embed_text`.
      attend, carry, xs: see `models.decoder.decoder`.
    """
    inputs = embedded.hidden, embedded.positions
    return _decode(model, params, *inputs, attend, carry, xs, layer_inputs=embedded.layer_inputs)


def run_stages(
    model: VisionLanguageModel,
    params: Params,
    prompt: Stage,
    plan: Plan,
    attend: Callable[[Stage], Any],
    carry: Any = None,
) -> tuple[jax.Array, Any, list[tuple[Stage, Any]]]:
    """`run_layers` of prompts that lose tokens between layers: one stage after another.

    Args:
      prompt: the first stage.
      plan: where tokens are dropped; of the prompt's length.
      attend: the attention of a stage's layers; its `xs` are their numbers.
      carry: the first layer's.

    Returns:
      (logits, the last layer's carry, every stage with the ys of its layers).
    """
    sizes, stages, outputs = plan.sizes(model.spec.num_layers), [prompt], []

    def project(layer: int, hidden: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def record(query, key, value, carry, xs):
            return jnp.zeros_like(query), carry, (query, key, value)

        _, _, seen = _decode(model, params, hidden, positions, record, layers=(layer, layer + 1))
        return jax.tree.map(lambda x: x[0], seen)

    visual = jnp.sum(prompt.droppable, axis=1, dtype=jnp.int32)
    hidden = prompt.hidden
    for number, size in enumerate(sizes):
        stage = stages[-1]
        if number:
            assert plan.pruning is not None
            ran = dataclasses.replace(stage, hidden=hidden)
            between = Between(stage=ran, entered=stage, prompt=prompt, project=project)
            scores = plan.pruning.scores(number - 1, between)
            count = plan.pruning.kept(number - 1, visual)
            stage = ran.dropping(scores, count, plan.rooms[number], size)
            stages.append(stage)
        if size:
            part = {} if len(sizes) == 1 else {"layers": stage.layers}
            layers = stage.layers[0] + jax.lax.iota(jnp.int32, size)
            inputs = stage.hidden, stage.positions, attend(stage)
            more = stage.layer_inputs
            hidden, carry, ys = _decode(model, params, *inputs, carry, layers, layer_inputs=more, **part)
            outputs.append((stage, ys))
    return last_logits(model, params, hidden, stages[-1].lengths), carry, outputs


def _decode(model: VisionLanguageModel, params: Params, *inputs: Any, **options: Any) -> tuple[jax.Array, Any, Any]:
    """What a model need not know of is not handed to it."""
    options = {name: x for name, x in options.items() if x is not None}
    return model.apply({"params": params}, *inputs, method="decode", **options)


def last_logits(model: VisionLanguageModel, params: Params, hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """Logits of the token behind each row's last one, f32 [batch, vocab]; hidden [batch, length, hidden]."""
    if hidden.shape[1] > 1:
        hidden = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    return unembed(model, params, hidden[:, 0])


def unembed(model: VisionLanguageModel, params: Params, hidden: jax.Array) -> jax.Array:
    """f32 logits [..., vocab] of [..., hidden]."""
    return model.apply({"params": params}, hidden, method="unembed")
