"""VASparse (arXiv 2501.06553, CVPR 2025): answers that look at few tokens, those that see the image among them."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.cache.selection import largest
from vlcache_jax.cache.state import KVState
from vlcache_jax.errors import PolicyError, is_number
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.policies.decoding.rule import Step, named
from vlcache_jax.policies.decoding.slot_notes import NotingRule
from vlcache_jax.policies.scores.attention import LayerInputs
from vlcache_jax.typing import ModelSpec


@named("va_sparse")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VASparse(NotingRule):
    """Each query of an answer attends to a part of the prompt's kept tokens, and its logits are contrasted.

    In every layer and for every query head, of the n tokens kept of the prompt the floor(keep n) with the largest

        (q . k_i)² + weight P_i,    P = softmax over tokens i of the prompt of (sum over its visual tokens j of A[i, j])

    are attended to, at least one, and all generated tokens; A is the prompt's own attention in the layer, averaged over
    heads. The logits become

        logits - contrast * early

    with `early` the logits of the embedding of the last token alone, through the final norm and the head.

    After the paper's text, not its code, which selects at random or not at all. The size of the kept set, `weight` and
    how attention that sinks into text is penalised are not known here, and the last is left out; A is the same layer's,
    where the paper speaks of the one before. Nothing is evicted, and keys of all tokens are read: this changes answers,
    it does not save memory. P costs the prefill a second attention of every layer.

    Attributes:
      keep: which part of the kept tokens a query attends to.
      weight: of P.
      contrast: of the early logits; 0 leaves them out. Reported log-probabilities are those of the contrasted logits.

    Raises:
      PolicyError: a value out of range; as a policy's rule also: slots that differ from layer to layer, a quantised
        store, or evicted tokens that are not dropped.

    Example:
      policy = dataclasses.replace(vlc.FullCache(), decoding=vlc.VASparse(keep=0.5))
    """

    keep: float = 0.5
    weight: float = 1.0
    contrast: float = 0.1

    def __post_init__(self) -> None:
        for name, low, high in (("keep", 1e-4, 1), ("weight", 0, 1e6), ("contrast", 0, 1)):
            value = getattr(self, name)
            if not is_number(value, low, high):
                raise PolicyError(f"VASparse({name}={value!r}) is out of range: give a number from {low:g} to {high:g}")

    def note(self, inputs: LayerInputs) -> jax.Array:
        """See `DecodingRule.note`: P, f32 [batch, length]."""
        visual = (inputs.vision_mask & inputs.valid)[..., None, None]
        marks = jnp.broadcast_to(visual, inputs.value.shape).astype(inputs.value.dtype)
        masses = ops.attention(
            Kernels(), inputs.query, inputs.key, marks, inputs.lengths, mask=inputs.mask, with_lse=False
        )[0]
        mass = jnp.mean(masses[..., 0].astype(jnp.float32), axis=2)
        return jax.nn.softmax(jnp.where(inputs.valid, mass, -jnp.inf), axis=1)

    def attend(self, state: KVState, kernels: Kernels, spec: ModelSpec) -> Step:
        def weigh(logits: jax.Array, inside: jax.Array, noted: jax.Array, layer: jax.Array) -> jax.Array:
            room = noted.shape[-1]
            of_prompt = inside[..., :room]
            scores = jnp.square(logits[..., :room]) * spec.head_dim + self.weight * noted
            count = jnp.sum(of_prompt, axis=-1, keepdims=True, dtype=jnp.int32)
            wanted = jnp.broadcast_to(jnp.maximum(floor_fraction(count, self.keep), 1), (*scores.shape[:-1], 1))
            seen = largest(jnp.where(of_prompt, scores, -jnp.inf), wanted) & of_prompt
            seen = jnp.concatenate([seen, jnp.broadcast_to(inside, logits.shape)[..., room:]], axis=-1)
            return jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)

        return self.weighed(state, kernels, weigh)
