"""CriticalKV (Feng et al., arXiv 2502.03805), on SnapKV's votes."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.errors import PolicyError, is_number
from vlcache_jax.kernels.chunks import in_chunks
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.methods.snap_kv import WINDOW, observation_window, snap_score
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.rows.spans import LastRows
from vlcache_jax.policies.scores.attention import Derived, LayerInputs
from vlcache_jax.policies.scores.staged import open_tokens, staged
from vlcache_jax.policies.window import Recent, Window

_BYTES = 2**26  # of projected values, of all rows, that exist at once


@dataclasses.dataclass(frozen=True)
class OutputPerturbation(Derived):
    """Some tokens by attention alone, the others by attention times what their value adds to the layer's output.

    With s_j the score of a KV head, which is attention, per row that gives it, and W_h the part of the output
    projection that belongs to query head h:

        weight_j = (s_j + epsilon) * |v_j W_h|_1, the norms averaged over the query heads of the KV head

    Of the k slots that sinks and window leave to the scores in an average layer, floor(first k) go to the best s, the
    others to the best weights of what is left.

    Attributes:
      score: attention, not negative.
      first: the part of the slots that goes by the score alone.
      epsilon: added to the score, so that a large value counts where there is hardly attention.
      recent, sinks: `Policy.recent` and `Policy.sinks`.
    """

    first: float = 0.5
    epsilon: float = 1e-4
    recent: Recent = Window(WINDOW)  # noqa: RUF009  # frozen
    sinks: int = 0
    needs_output = True
    is_mass = False

    def __post_init__(self) -> None:
        if not is_number(self.first, 0, 1):
            raise PolicyError(f"first={self.first!r} is out of range: give a fraction in [0, 1]")
        if isinstance(self.epsilon, bool) or not 0 <= self.epsilon < float("inf"):
            raise PolicyError(f"epsilon={self.epsilon!r} is out of range: give a number of 0 or more")

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        share = self.score(inputs).astype(jnp.float32) / inputs.rows.astype(jnp.float32)[:, None, None]
        norm = projected_norm(inputs)
        if share.shape[1] == 1:
            norm = jnp.mean(norm, axis=1, keepdims=True)
        competes, slots = open_tokens(inputs, self.recent, self.sinks)
        return staged(share, (share + self.epsilon) * norm, competes, floor_fraction(slots, self.first))


def projected_norm(inputs: LayerInputs) -> jax.Array:
    """Sums of the absolute values of v_j W_h, averaged over a KV head's query heads; f32 [batch, kv_heads, length]."""
    assert inputs.output is not None, "a score that looks at the output projection says so: needs_output = True"
    batch, _, kv_heads, head_dim = inputs.value.shape
    output = inputs.output.reshape(kv_heads, -1, head_dim, inputs.output.shape[-1])
    of_token = 4 * batch * inputs.output.size // head_dim

    def norms(value: jax.Array, _: jax.Array | int) -> jax.Array:  # [batch, tokens, kv_heads, head_dim]
        one_type = jnp.promote_types(value.dtype, output.dtype)
        added = jnp.einsum(
            "btkd,kgdo->kbtgo",  # heads in front, so that a token's sums do not depend on how many there are
            value.astype(one_type),
            output.astype(one_type),
            precision="highest",
            preferred_element_type=jnp.float32,
        )
        return jnp.moveaxis(jnp.mean(jnp.sum(jnp.abs(added), axis=-1), axis=-1), 0, 2)

    return in_chunks(norms, inputs.value, max(16, _BYTES // of_token // 16 * 16)).swapaxes(1, 2)


@method("critical_kv", title="CriticalKV")
def CriticalKV(
    budget: Budget = DEFAULT_BUDGET,
    *,
    first: float = 0.5,
    epsilon: float = 1e-4,
    window: int | None = None,
    pool: int = 5,
    pooling: str = "mean",
    recent: Recent | None = None,
    **options: Unpack[Options],
) -> Policy:
    """SnapKV's votes, half of them weighed by what a token would change in the layer's output; `OutputPerturbation`.

    Choices. The halves are of the slots that the window leaves in an average layer; in kvpress they are of all slots,
    the window among the first half. For other scores wrap them: `dataclasses.replace(policy,
    score=OutputPerturbation(policy.score, recent=policy.recent, sinks=policy.sinks))`.

    Query-aware, if the question lies in the last rows. It reads the output projection of every layer, and multiplies
    all values of the prompt with it: about what that projection costs a prefill.

    Args:
      budget: see `Policy.budget`.
      first: the part of the slots that goes by the votes alone.
      epsilon: added to the votes of a row.
      window, pool, pooling, recent: as in `SnapKV`.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range, or a window that does not fit into a budget in tokens.

    Example:
      >>> CriticalKV().score.needs_output
      True
    """
    count, recent = observation_window(window, recent)
    return Policy(
        name="critical_kv",
        budget=budget,
        rows=LastRows(count),
        score=OutputPerturbation(snap_score(pool, pooling, recent=recent), first, epsilon, recent),
        recent=recent,
        **options,
    )
