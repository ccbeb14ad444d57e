"""The prompts' queries, keys and values, computed once and replayed to every method.

The attention of a prefill is that of the full cache whatever the policy: what a policy sees of a prompt, and the logits
of the first token, are the same for all. `Replay` is a model to `prefill` and `decode` like any other, but its prompt
comes from a recording, so that of the prefill only scoring, selection and packing are left to do, by the library's own
code; decoding runs the real model.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlcache_jax.inference.forward import embed_prompt, last_logits, run_layers
from vlcache_jax.inputs import Batch
from vlcache_jax.models.families.module import in_order
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.pruning.stage import Stage
from vlcache_jax.typing import Embedded, ModelSpec, Params, VisionLanguageModel, WithOutput

_PLACEHOLDER = 0  # width of the hidden states of a replayed prompt, of which nothing is asked


class Recording(NamedTuple):
    """What the layers computed for a batch of prompts.

    Attributes:
      query: [layers, batch, length, heads, head_dim], rotated.
      key: [layers, batch, length, kv_heads, head_dim], rotated.
      value: like `key`.
      logits: f32 [batch, vocab], of the first token.
      output: [layers, heads, head_dim, hidden], of the layers; see `WithOutput`.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    logits: jax.Array
    output: jax.Array


@partial(jax.jit, static_argnames=("model", "repeated"))
def record(model: VisionLanguageModel, params: Params, batch: Batch, repeated: bool = False) -> Recording:
    """Runs the prompts through the model, as `prefill` does, and keeps what every layer computed.

    `repeated`: with every prompt said twice, for policies that have it so (`Policy.repeats`); twice the length, of
    which the first half serves all others, and the logits are those of the prompts.
    """
    kernels, said = Kernels(), jnp.asarray(batch.lengths)
    lengths = 2 * said if repeated else said

    def attend(query, key, value, carry, _, output):
        out, _ = ops.attention(kernels, query, key, value, lengths, with_lse=False)
        return out, carry, (query, key, value, output)

    embedded = embed_prompt(model, params, batch)
    if repeated:
        following, layers = embedded.next_position, model.spec.num_layers
        stage = Stage.of_prompt(embedded, said, jnp.asarray(batch.vision_index), layers).repeated(following)
        embedded = Embedded(stage.hidden, stage.positions, following, layer_inputs=stage.layer_inputs)
    hidden, _, (query, key, value, output) = run_layers(model, params, embedded, WithOutput(attend))
    return Recording(query, key, value, last_logits(model, params, hidden, said), output)


@dataclasses.dataclass(frozen=True)
class Replay:
    """A model whose prompts are replayed; see `vlcache_jax.typing.VisionLanguageModel`.

    Its parameters are {"model": those of the model, "recording": of the batch it is given}.
    """

    model: Any

    @property
    def spec(self) -> ModelSpec:
        """That of the model."""
        return self.model.spec

    def apply(self, variables: Any, *args: Any, method: str, **kwargs: Any) -> Any:
        """Replays `embed`, `decode` and `unembed` of a prompt; everything else is the model's."""
        if method == "embed":
            batch = args[0]
            return in_order(jnp.zeros((batch.size, batch.length, _PLACEHOLDER)), batch)
        replayed = method in ("decode", "unembed") and args[0].shape[-1] == _PLACEHOLDER
        if not replayed:
            own = {"params": variables["params"]["model"]} if variables else {}
            return self.model.apply(own, *args, method=method, **kwargs)
        recording: Recording = variables["params"]["recording"]
        if method == "unembed":
            return recording.logits
        hidden, _, attend, carry, xs = args

        def layer(carry, item):
            query, key, value, output, x = item
            told = (output,) if isinstance(attend, WithOutput) else ()
            _, carry, ys = attend(query, key, value, carry, x, *told)
            return carry, ys

        computed = (x[:, :, : hidden.shape[1]] for x in (recording.query, recording.key, recording.value))
        return hidden, *jax.lax.scan(layer, carry, (*computed, recording.output, xs))


def first_columns(recording: Recording, length: int) -> Recording:
    """The recording of the prompts' first `length` tokens, which is what they are without the rest; no logits."""
    query, key, value = (x[:, :, :length] for x in (recording.query, recording.key, recording.value))
    return Recording(query, key, value, jnp.zeros_like(recording.logits), recording.output)
