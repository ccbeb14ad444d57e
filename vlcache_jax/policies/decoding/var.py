"""VAR, visual attention redistribution (arXiv 2503.03321, ICLR 2025): from sinks to the rest of the image."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.cache.state import KVState
from vlcache_jax.errors import PolicyError, is_number, is_whole
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.policies.decoding.rule import Step, named
from vlcache_jax.policies.decoding.slot_notes import NotingRule
from vlcache_jax.policies.scores.attention import LayerInputs
from vlcache_jax.typing import ModelSpec

_ROWS = 32  # of the prompt's last, by whose attention sinks are told
_SINK = 2  # what is added to the note of a sink, which is 1 of a visual token and 0 of text


@named("var")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VAR(NotingRule):
    """In heads that look at the image, a part of the attention that sinks take goes to the image's other tokens.

    For a query head whose weights spend W on visual tokens, S of it on visual sinks, where

        S <= ratio W    and    W >= least    and the layer has a visual sink

    the weights of all sinks, of image and text, are multiplied by 1 - share, and what that frees goes to the visual
    tokens that are no sinks, in proportion to their weights. Others, and layers below `first`, stay as they are.

    A token of the prompt is a sink of a layer if, in the prefill,

        attention received of the last 32 rows, averaged over heads,  >  outlier * its mean over tokens,    and
        |v|  <  value * mean of |v|

    Deviates. The paper tells sinks by massive activations of hidden states, in dimensions that are known for a few
    models; a cache sees no hidden states, and sinks are also known by small value vectors. It redistributes the
    prompt's own text rows, too; here the answer's alone, from its second token on.

    Attributes:
      share: what sinks give up; 0 changes nothing. The paper's p is 1 - share.
      ratio: the largest part of the attention to the image that its sinks may take.
      least: the least attention to the image.
      first: the first layer.
      outlier, value: see above; these thresholds are choices of this project.

    Raises:
      PolicyError: a value out of range; as a policy's rule also: slots that differ from layer to layer, a quantised
        store, or evicted tokens that are not dropped.

    Example:
      policy = dataclasses.replace(vlc.FullCache(), decoding=vlc.VAR())
    """

    share: float = 0.4
    ratio: float = 0.5
    least: float = 0.2
    first: int = 2
    outlier: float = 5.0
    value: float = 0.5

    def __post_init__(self) -> None:
        for name, high in (("share", 1.0), ("ratio", 1.0), ("least", 1.0), ("outlier", 1e6), ("value", 1e6)):
            number = getattr(self, name)
            if not is_number(number, 0, high):
                raise PolicyError(f"VAR({name}={number!r}) is out of range: give a number from 0 to {high:g}")
        if not is_whole(self.first, 0):
            raise PolicyError(f"VAR(first={self.first!r}) is out of range: give the number of a layer, from 0 on")

    def note(self, inputs: LayerInputs) -> jax.Array:
        """See `DecodingRule.note`: which tokens are visual, and which are sinks, f32 [batch, length]."""
        valid, count = inputs.valid, jnp.maximum(inputs.lengths, 1)[:, None].astype(jnp.float32)

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(valid, x, 0), axis=1, keepdims=True) / count

        received = _received(inputs)
        norm = jnp.sqrt(jnp.sum(jnp.square(inputs.value.astype(jnp.float32)), axis=(2, 3)))
        sink = (received > self.outlier * mean(received)) & (norm < self.value * mean(norm))
        return jnp.where(valid, jnp.where(inputs.vision_mask, 1.0, 0.0) + jnp.where(sink, float(_SINK), 0.0), 0.0)

    def attend(self, state: KVState, kernels: Kernels, spec: ModelSpec) -> Step:
        def weigh(logits: jax.Array, inside: jax.Array, noted: jax.Array, layer: jax.Array) -> jax.Array:
            weights = jax.nn.softmax(logits, axis=-1)
            noted = jnp.where(inside, jnp.pad(noted, [(0, 0)] * 3 + [(0, logits.shape[-1] - noted.shape[-1])]), 0)
            sink, visual = noted >= _SINK, noted % _SINK == 1

            def mass(where: jax.Array) -> jax.Array:
                return jnp.sum(jnp.where(where, weights, 0), axis=-1, keepdims=True)

            of_image, of_sinks, rest = mass(visual), mass(visual & sink), mass(visual & ~sink)
            chosen = (of_sinks <= self.ratio * of_image) & (of_image >= self.least) & (rest > 0) & (layer >= self.first)
            chosen &= jnp.any(visual & sink, axis=-1, keepdims=True)
            freed = self.share * mass(sink)
            new = jnp.where(sink, (1 - self.share) * weights, weights)
            new = jnp.where(visual & ~sink, weights * (1 + freed / jnp.maximum(rest, 1e-30)), new)
            return jnp.where(chosen, new, weights)

        return self.weighed(state, kernels, weigh)


def _received(inputs: LayerInputs) -> jax.Array:
    """f32 [batch, length], what each token gets of the attention of the last rows, averaged over rows and heads."""
    batch, length, _, head_dim = inputs.query.shape
    rows = min(_ROWS, length)
    number = inputs.lengths[:, None] - rows + jax.lax.iota(jnp.int32, rows)[None]
    query = jnp.take_along_axis(inputs.query, jnp.maximum(number, 0)[..., None, None], axis=1)
    query = query.reshape(batch, rows, inputs.key.shape[2], -1, head_dim)
    logits: Any = jnp.einsum("brhgd,bkhd->bhgrk", query, inputs.key, preferred_element_type=jnp.float32)
    seen = jax.lax.iota(jnp.int32, length)[None, None] <= number[..., None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits * head_dim**-0.5, -1e30), axis=-1)
    real = (number >= 0).astype(jnp.float32)
    total = jnp.einsum("bhgrk,br->bk", weights, real, precision="highest")
    heads = weights.shape[1] * weights.shape[2]
    return total / (heads * jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1))
