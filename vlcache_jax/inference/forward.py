"""The way through a model: embeddings, the layers with somebody's attention, logits of each row's last token."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.pruning.method import Between
from vlcache_jax.pruning.plan import Plan
from vlcache_jax.pruning.stage import Stage, joined
from vlcache_jax.typing import Embedded, Params, TowerView, VisionLanguageModel


def embed_prompt(model: VisionLanguageModel, params: Params, batch: Any, tower: bool = False) -> Embedded:
    """The prompts of a `Batch`; with what the vision tower says of them, if asked."""
    return model.apply({"params": params}, batch, method="embed", **({"tower": True} if tower else {}))


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
    *,
    tower: TowerView | None = None,
) -> tuple[jax.Array, Any, list[tuple[Stage, Any]]]:
    """`run_layers` of prompts that lose tokens between layers: one stage after another.

    Args:
      prompt: the first stage.
      plan: where tokens are dropped; of the prompt's length.
      attend: the attention of a stage's layers; its `xs` are their numbers.
      carry: the first layer's.
      tower: what the vision tower says of the prompts, for a method that asks.

    Returns:
      (logits, the last layer's carry, every stage with the ys of its layers).
    """
    sizes, stages, outputs = plan.sizes(model.spec.num_layers), [prompt], []

    def project(layer: int, hidden: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def record(query, key, value, carry, xs):
            return jnp.zeros_like(query), carry, (query, key, value)

        _, _, seen = _decode(model, params, hidden, positions, record, layers=(layer, layer + 1))
        return jax.tree.map(lambda x: x[0], seen)

    def project_features(features: jax.Array) -> jax.Array:
        return model.apply({"params": params}, features, method="project_features")

    method = plan.pruning
    visual = jnp.sum(prompt.droppable, axis=1, dtype=jnp.int32)
    hidden, entered, watched = prompt.hidden, prompt, None
    for number, size in enumerate(sizes):
        stage = stages[-1]
        if number:
            assert method is not None
            ran = dataclasses.replace(stage, hidden=hidden)
            between = Between(ran, entered, prompt, project, tower, project_features, watched)
            choice, left = method.choose(number - 1, between), jnp.sum(ran.droppable, axis=1, dtype=jnp.int32)
            count = method.kept(number - 1, visual, left) if choice.count is None else choice.count
            protected = None if ran.grid is None else method.protected(number - 1, ran.grid)
            stage = ran.dropping(choice, count, protected, plan.rooms[number], size)
            stages.append(stage)
            hidden, entered = stage.hidden, stage
        ranges = [stage.layers] if size else []
        if method is not None and method.looks_back and size > 1 and number + 1 < len(sizes):
            ranges = [(stage.layers[0], stage.layers[1] - 1), (stage.layers[1] - 1, stage.layers[1])]
        parts = []
        for first, end in ranges:
            part = {} if len(sizes) == 1 else {"layers": (first, end)}
            entered = dataclasses.replace(stage, hidden=hidden)
            layers, more = first + jax.lax.iota(jnp.int32, end - first), stage.layer_inputs
            inputs = hidden, stage.positions, attend(stage)
            watches = method is not None and method.watches and number + 1 < len(sizes) and end == stage.layers[1]
            watch = partial(method.watch, stage) if watches and method is not None else None
            hidden, carry, ys = _decode(model, params, *inputs, carry, layers, layer_inputs=more, neurons=watch, **part)
            if watch is not None:
                ys, of_layers = ys
                watched = jax.tree.map(lambda x: x[-1], of_layers)
            parts.append(ys)
        if parts:
            outputs.append((stage, joined(parts)))
    return last_logits(model, params, hidden, stages[-1].once().lengths), carry, outputs


def _decode(model: VisionLanguageModel, params: Params, *inputs: Any, **options: Any) -> tuple[jax.Array, Any, Any]:
    """What a model need not know of is not handed to it."""
    options = {name: x for name, x in options.items() if x is not None}
    return model.apply({"params": params}, *inputs, method="decode", **options)


def last_logits(model: VisionLanguageModel, params: Params, hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """Logits of the token behind each row's last one, f32 [batch, vocab]; hidden [batch, length, hidden]."""
    if hidden.shape[1] > 1:
        hidden = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    return unembed(model, params, hidden[:, 0])


def contrasted(
    model: VisionLanguageModel, params: Params, logits: jax.Array, hidden: jax.Array, contrast: float
) -> jax.Array:
    """Logits f32 [batch, vocab] minus `contrast` times those of the last token's embedding [batch, hidden] alone.

    An early exit in front of the first layer: through the final norm and the head, for which no layer is run.
    """
    if not contrast:
        return logits

    def nothing(query, key, value, carry, xs):
        return jnp.zeros_like(query), carry, None

    end, one = model.spec.num_layers, jnp.zeros((len(hidden), 1), jnp.int32)
    early, _, _ = _decode(model, params, hidden[:, None], one, nothing, layers=(end, end))
    return logits - contrast * unembed(model, params, early[:, 0])


def unembed(model: VisionLanguageModel, params: Params, hidden: jax.Array) -> jax.Array:
    """f32 logits [..., vocab] of [..., hidden]."""
    return model.apply({"params": params}, hidden, method="unembed")
