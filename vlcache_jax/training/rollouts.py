"""Rollouts for policy gradients: several samples of a prompt from one compressed prefill, and how likely they were.

What draws them is not what is trained: the cache is compressed, and the temperature and its filters change the
probabilities. So each sampled token has up to three numbers, natural logarithms of probabilities:

    sampled   with which it was drawn: under what the cache kept, after temperature and filters
    raw       under what the cache kept, before them
    full      under the full cache, before them: the policy that is trained; one more pass, over prompts and answers

exp(full - sampled), cut at some number, is the importance weight that makes an expectation over what was drawn one over
the policy that is trained (https://arxiv.org/abs/2410.18252 uses it for other mismatches).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.files.exporting import exportable
from vlcache_jax.inference.generate import answer
from vlcache_jax.inference.prefill import compress
from vlcache_jax.inference.recipe import Recipe
from vlcache_jax.inference.row_options import StopIds
from vlcache_jax.inference.sampling import Sampling
from vlcache_jax.inference.score import score
from vlcache_jax.inputs import Batch
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.seeds import Seeds
from vlcache_jax.policies.policy import Policy
from vlcache_jax.training.state import Loss, Metrics, Params
from vlcache_jax.typing import VisionLanguageModel


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Rollouts:
    """Samples of prompts. A pytree; every array has the prompts as its first axis.

    Attributes:
      tokens: i32 [prompts, samples, max_new_tokens], filled with the pad id after an end.
      lengths: i32 [prompts, samples], the id that ends an answer included.
      sampled, raw, full: f32 like `tokens`, see the module; 0 behind an end. `full` is None if it was not asked for.
    """

    tokens: jax.Array
    lengths: jax.Array
    sampled: jax.Array
    raw: jax.Array
    full: jax.Array | None = None

    @property
    def counts(self) -> jax.Array:
        """bool like `tokens`: which are of an answer."""
        return jax.lax.iota(jnp.int32, self.tokens.shape[-1])[None, None] < self.lengths[..., None]


def rollout(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    policy: Policy | Recipe | None = None,
    max_new_tokens: int = 64,
    *,
    samples: int = 8,
    sampling: Sampling | None = None,
    seeds: Seeds = 0,
    full: bool = False,
    eos_token_ids: StopIds = None,
    kernels: Kernels | None = None,
) -> Rollouts:
    """Draws several answers to each prompt from one prefill; the compressed cache is neither copied nor repeated.

    Pure: works inside a jitted step, on a mesh, with adapters beside the kernels (`Lora.applied`).

    Args:
      model, params, batch, policy, max_new_tokens, eos_token_ids, kernels: as in `vlc.generate`.
      samples: of each prompt.
      sampling: how to draw; temperature 1 and no filters by default.
      seeds: as in `vlc.answer`; give another one to every step.
      full: whether to compute `Rollouts.full`.

    Returns:
      The samples and their log-probabilities.

    Raises:
      InputError: see `vlc.generate` and `vlc.answer`.

    Example:
      out = rollout(vlm.model, params, batch, vlc.VLCache(0.1), 64, samples=8, seeds=step, full=True)
    """
    sampling = Sampling() if sampling is None else sampling
    ctx = compress(model, params, batch, policy, kernels=kernels)
    out = answer(
        ctx, max_new_tokens=max_new_tokens, samples=samples, sampling=sampling, seeds=seeds,
        eos_token_ids=eos_token_ids, log_probabilities=True, kernels=kernels,
    )  # fmt: skip
    of_full = log_probabilities(model, params, batch, out, kernels=kernels) if full else None
    return Rollouts(out.tokens, out.lengths, out.sampling_log_probabilities, out.log_probabilities, of_full)  # type: ignore[arg-type]


def log_probabilities(
    model: VisionLanguageModel, params: Params, batch: Batch, answers: Any, *, kernels: Kernels | None = None
) -> jax.Array:
    """Log-probabilities of several answers to each prompt under the full cache, f32 [prompts, samples, length].

    One pass over the prompts, and one over all answers; differentiable. `answers` is anything with `tokens` and
    `lengths`, such as `Rollouts`.
    """
    return score(compress(model, params, batch, kernels=kernels), answers, kernels=kernels).log_probabilities


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """What a policy-gradient step eats; every array has the prompts as its first axis.

    Attributes:
      prompts: the batch that was answered.
      rollouts: the answers.
      advantages: f32 [prompts, samples], how much better than expected each of them is.
    """

    prompts: Batch
    rollouts: Rollouts
    advantages: jax.Array | np.ndarray


def advantages(rewards: Any, *, divide: bool = True) -> np.ndarray:
    """Rewards [prompts, samples] less their prompt's mean (GRPO, https://arxiv.org/abs/2402.03300).

    Args:
      rewards: one for each answer.
      divide: by their prompt's standard deviation, too; without it prompts that are nearly always, or never, answered
        count no more than others (https://arxiv.org/abs/2503.20783).

    Example:
      >>> advantages([[1, 0, 0, 1], [0, 0, 0, 0]]).round(2).tolist()
      [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    rewards = np.asarray(rewards, np.float32)
    above = rewards - rewards.mean(axis=1, keepdims=True)
    return above / (rewards.std(axis=1, keepdims=True) + 1e-4) if divide else above


def grpo_loss(
    model: VisionLanguageModel, *, clip: float = 0.2, correction: float | None = 2.0, kernels: Kernels | None = None
) -> Loss:
    """The loss of `make_train_step` for a `Group`: clipped policy gradients, each token counting alike.

        ratio = exp(log p - log p_old)                  of a token under the full cache, now and when it was drawn
        loss  = - mean of weight * min(ratio * advantage, cut(ratio, 1 - clip, 1 + clip) * advantage)
        weight = min(exp(log p_old - sampled), correction)                       1 without a correction

    Args:
      model: that is trained.
      clip: how far a token's probability may move before it has no gradient.
      correction: the most that an importance weight may be, which makes up for the compressed cache, temperature and
        filters; None for no weights.
      kernels: as in `vlc.generate`.

    Returns:
      The loss. Its metrics: "weight" (tokens), "ratio" (mean), "mismatch" (mean of |log p_old - sampled|, in nats).
      `Rollouts.full` is `log p_old`; without it the parameters must be those that drew, as in a single step for each
      rollout.

    Example:
      step = make_train_step(grpo_loss(vlm.model), optax.adamw(1e-5))
      out = rollout(vlm.model, merge(frozen, state.params), batch, vlc.VLCache(0.1), seeds=number)
      state, metrics = step(state, Group(batch, out, advantages(rewards(out))), frozen)
    """

    def loss(params: Params, group: Group) -> tuple[jax.Array, Metrics]:
        rollouts = group.rollouts
        now = log_probabilities(model, params, group.prompts, rollouts, kernels=kernels)
        old = jax.lax.stop_gradient(now) if rollouts.full is None else rollouts.full
        counts = rollouts.counts.astype(jnp.float32)
        tokens = jnp.maximum(jnp.sum(counts), 1)
        above = jnp.asarray(group.advantages)[..., None]
        ratio = jnp.exp(now - old)
        gain = jnp.minimum(ratio * above, jnp.clip(ratio, 1 - clip, 1 + clip) * above)
        if correction is not None:
            gain = gain * jnp.minimum(jnp.exp(old - rollouts.sampled), correction)
        return -jnp.sum(gain * counts) / tokens, {
            "weight": tokens,
            "ratio": jnp.sum(ratio * counts) / tokens,
            "mismatch": jnp.sum(jnp.abs(old - rollouts.sampled) * counts) / tokens,
        }

    return loss
