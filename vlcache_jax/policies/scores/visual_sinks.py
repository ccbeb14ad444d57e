"""Masking visual attention sinks (after Kang et al., "See What You Are Told", arXiv 2503.03321, ICLR 2025)."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError
from vlcache_jax.policies.scores.attention import Derived, LayerInputs, Score


@dataclasses.dataclass(frozen=True)
class MaskVisualSinks(Derived):
    """Takes their score from visual sinks: they draw much attention whatever is asked and carry little.

    A visual token j of a KV head is taken for a sink if

        score_j > outlier * mean of the score over the row's visual tokens, and
        |v_j|   < value   * mean of |v| over the row's visual tokens

    and then scores 0; pooled afterwards, it is judged by its neighbours.

    The paper finds its sinks by massive activations of a few known dimensions of the hidden state, above 20 times its
    root mean square. These dimensions differ from model to model and a score here sees no hidden states, so this
    is a stand-in of this project: sinks are also known for small value vectors. The thresholds are choices, not the
    paper's. Give it a score that is not negative, such as attention.

    Attributes:
      score: what to mask.
      outlier: how many times the mean score a sink has at least.
      value: how many times the mean norm of the value vector it has at most.
    """

    outlier: float = 5.0
    value: float = 0.5

    def __post_init__(self) -> None:
        if not self.outlier >= 0 or not self.value >= 0:
            raise PolicyError(f"outlier={self.outlier} and value={self.value} must not be negative")

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        scores = self.score(inputs).astype(jnp.float32)
        visual = (inputs.vision_mask & inputs.valid)[:, None]
        norm = jnp.linalg.norm(inputs.value.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        if scores.shape[1] == 1:
            norm = jnp.mean(norm, axis=1, keepdims=True)
        count = jnp.maximum(jnp.sum(visual, axis=-1, keepdims=True), 1).astype(jnp.float32)

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(visual, x, 0), axis=-1, keepdims=True) / count

        sink = visual & (scores > self.outlier * mean(scores)) & (norm < self.value * mean(norm))
        return jnp.where(sink, 0, scores)


def without_sinks(score: Score, mask: bool = True) -> Score:
    """`score` with visual sinks masked, if `mask`."""
    return MaskVisualSinks(score) if mask else score
