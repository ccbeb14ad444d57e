"""ZipVL's cache (He et al., arXiv 2410.08584, ICCV 2025), on ZipCache's quantisation (arXiv 2405.14256)."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError
from vlcache_jax.policies.allocate.equal_mass import EqualMass
from vlcache_jax.policies.budget import Budget
from vlcache_jax.policies.evicted.drop import Drop
from vlcache_jax.policies.evicted.quantise import Quantise
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Policy
from vlcache_jax.policies.rows.spans import LastRows
from vlcache_jax.policies.scores.attention import AccumulatedAttention, LayerInputs
from vlcache_jax.policies.shares import SlotBudget


@dataclasses.dataclass(frozen=True)
class EnoughMass(EqualMass):
    """Every layer keeps as many tokens as hold the share `mass` of its accumulated attention, whatever their scores.

    Those are the fewest tokens that can: the ones with the most attention, averaged over all query heads. The policy's
    budget is a cap on all layers together. Where it binds, the layers keep the largest common share that fits
    (`EqualMass`).

    Raises:
      PolicyError: mass outside (0, 1).
    """

    mass: float = 0.975

    def __post_init__(self) -> None:
        if isinstance(self.mass, bool) or not isinstance(self.mass, float) or not 0 < self.mass < 1:
            raise PolicyError(f"mass={self.mass!r} is out of range: give a share of the attention, in (0, 1)")

    def measure(self, inputs: LayerInputs, scores: jax.Array) -> jax.Array:
        """See `EqualMass.measure`; of the attention itself, not of the scores."""
        return super().measure(inputs, AccumulatedAttention("shared")(inputs))

    def slots(self, measured: jax.Array, lengths: jax.Array, budget: SlotBudget) -> jax.Array:
        # A token is needed as long as the better ones hold less than the mass. EqualMass takes the smallest shares of
        # all layers, so it takes all that are needed, or none but those.
        enough = jnp.sum(measured < self.mass, axis=2, dtype=jnp.int32)
        return jnp.minimum(enough, super().slots(measured, lengths, budget))


@method("zip_vl", title="ZipVL")
def ZipVL(
    budget: Budget = 0.6,
    *,
    mass: float = 0.975,
    window: int = 64,
    bits: int | str | None = 4,
    evicted: str = "quantise",
    evicted_bits: int | str = 2,
) -> Policy:
    """As many important tokens as hold 97.5 % of a layer's attention at 4 bits; the others at 2 bits, or evicted.

        a_j = sum over the last `window` rows q of A[q, j], averaged over all query heads: one selection for the layer
        p   = the fewest tokens whose a_j add up to mass * (sum of a); at most `budget` of all layers
        important: the p tokens with the largest a_j / (number of those rows that see j)

    Choices. The authors released no code: the ratio's formula, the share of 97.5 % and the probe rows are second-hand;
    the normalised score and the storage are ZipCache's. ZipVL probes 64 recent and 64 random rows; here rows are
    consecutive, so it is the recent ones. The paper's dynamic ratio has no cap; here the budget bounds the store, which
    must have a size before the prompt is seen: 0.6 is what ZipCache keeps at the higher precision. The last token is
    always important. Numbers are quantised as in every store (`kernels.quantisation`), not by ZipCache's scheme, which
    divides each channel of the values by the root of its largest one. The sparse attention of ZipVL's prefill is not
    part of this. Generated tokens stay in the model's dtype; ZipCache compresses them every 100 steps.

    With `evicted="quantise"` nothing is lost but precision. Query-aware, if the question lies in the last rows.

    Args:
      budget: cap on the important tokens; see `Policy.budget`.
      mass: share of the attention that the important tokens hold, in (0, 1).
      window: rows that score.
      bits: of the important tokens; None for the model's dtype.
      evicted: "quantise" keeps the others at `evicted_bits` (ZipVL's first version), "drop" evicts them (its second).
      evicted_bits: fewer than `bits`; of no effect with "drop".

    Raises:
      PolicyError: an option out of range, or a combination that cannot work.

    Example:
      >>> ZipVL().bits, ZipVL().evicted
      (4, Quantise(bits=2))
    """
    if evicted not in ("quantise", "drop"):
        raise PolicyError(f"evicted={evicted!r} is not known: use 'quantise' or 'drop'")
    return Policy(
        name="zip_vl",
        budget=budget,
        rows=LastRows(window),
        score=AccumulatedAttention("shared", normalised=True),
        allocate=EnoughMass(mass),
        recent=0.0,
        bits=bits,
        evicted=Quantise(evicted_bits) if evicted == "quantise" else Drop(),
    )
