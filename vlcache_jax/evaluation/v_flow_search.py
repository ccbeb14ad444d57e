"""VFlowOpt's offline search: the options under which pruning changes least of what a prompt's last token has become."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import InputError, PolicyError
from vlcache_jax.inference.prefill import prefill
from vlcache_jax.inputs import Batch
from vlcache_jax.pruning.methods.v_flow_opt import VFlowOpt
from vlcache_jax.typing import ModelSpec, Params, VisionLanguageModel

_STEP = 0.15  # of a range, around the best so far


@dataclasses.dataclass(frozen=True)
class _LastHidden:
    """A model whose logits are the hidden states that its own are made of."""

    model: Any

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def apply(self, variables: Any, *args: Any, method: str, **kwargs: Any) -> Any:
        if method == "unembed":
            return args[0].astype(jnp.float32)
        return self.model.apply(variables, *args, method=method, **kwargs)


def search_v_flow(
    model: VisionLanguageModel,
    params: Params,
    batches: Sequence[Batch],
    keep: float = 0.25,
    *,
    trials: int = 60,
    seed: int = 0,
) -> tuple[VFlowOpt, float]:
    """Searches for the options of `VFlowOpt` on prompts of one's own.

    The objective is the paper's: the mean over prompts (it takes 30) of the cosine of the last token's hidden state
    behind the last layer with that of the whole prompt. Every trial compiles its prefill.

    Args:
      model: a Flax module such as `vlm.model`, with a `spec.tower_attention`.
      params: its parameters.
      batches: prompts.
      keep: see `VFlowOpt`.
      trials, seed: see `search_options`.

    Returns:
      (the best method, its objective).

    Raises:
      InputError: no prompts, or no trials.
      PolicyError: see `VFlowOpt`.

    Example:
      pruning, cosine = search_v_flow(vlm.model, vlm.params, [vlm.processor(images, texts)], keep=0.25)
    """
    if not batches:
        raise InputError("there are no prompts to search on: give some")
    shown = _LastHidden(model)

    def hidden(pruning: VFlowOpt | None) -> np.ndarray:
        states = [prefill(shown, params, batch, pruning=pruning).logits for batch in batches]
        x = np.concatenate(jax.device_get(states)).astype(np.float64)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    whole = hidden(None)

    def cosine(pruning: VFlowOpt) -> float:
        return float(np.sum(hidden(pruning) * whole, axis=1).mean())

    return search_options(cosine, keep, trials, seed, model.spec.num_layers)


def search_options(
    objective: Callable[[VFlowOpt], float], keep: float, trials: int = 60, seed: int = 0, layers: int | None = None
) -> tuple[VFlowOpt, float]:
    """The options with the largest objective: a third of the trials are drawn from the paper's ranges, the others
    around the best so far. (The paper's search is a Gaussian process, over 300 trials.)

    Raises:
      InputError: no trials.

    Example:
      >>> found, value = search_options(lambda x: -abs(x.entropy - 0.3) - abs(x.merge - 9) / 9, 0.25, trials=90)
      >>> found.merge, value > -0.1
      (9, True)
    """
    if trials < 1:
        raise InputError(f"trials={trials}: give 1 or more")
    rng = np.random.default_rng(seed)
    low = np.array([keep, 0.533, -1.0, 3.0])
    high = np.array([min(1.0, 1.5 * keep), 1.0, 1.0, 24.0])
    best, most, at = None, -np.inf, (low + high) / 2
    for trial in range(trials):
        pruning = None
        while pruning is None:  # parts that cannot have the mean are drawn again
            near = rng.normal(at, _STEP * (high - low))
            values = rng.uniform(low, high) if 3 * trial < trials else np.clip(near, low, high)
            first, second, entropy, merge = values.tolist()
            try:
                pruning = VFlowOpt(keep, round(first, 4), round(second, 4), round(entropy, 4), round(merge), layers)
            except PolicyError:
                continue
        found = objective(pruning)
        if found > most:
            best, most, at = pruning, found, values
    assert best is not None
    return best, most
