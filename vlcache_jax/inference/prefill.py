"""Prefill: one program from a batch of prompts to a context, the next token's logits and the compressed cache.

embed -> scan over layers (attention, statistics, candidates) -> allocate -> select -> pack
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.cache.state import Allocation
from vlcache_jax.cache.store import PackedStore
from vlcache_jax.inference.context import Context
from vlcache_jax.inference.finiteness import finite_rows, require_finite
from vlcache_jax.inference.forward import contrasted, embed_prompt, run_stages
from vlcache_jax.inference.keep_all import keep_all
from vlcache_jax.inference.keep_some import keep_some
from vlcache_jax.inference.recipe import Recipe, recipe_of
from vlcache_jax.inference.report import make_report
from vlcache_jax.inference.validation import check_prefill
from vlcache_jax.inputs import Batch
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.mesh import automatic, on_mesh_of, refuse_partly_checked
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.placing import placed
from vlcache_jax.patterns.pattern import Pattern
from vlcache_jax.policies.policy import Policy
from vlcache_jax.pruning.grid import grid_of
from vlcache_jax.pruning.method import Pruning
from vlcache_jax.pruning.plan import Plan
from vlcache_jax.pruning.stage import Stage
from vlcache_jax.typing import Params, VisionLanguageModel


def prefill(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    policy: Policy | Recipe | None = None,
    *,
    prefill: Pattern | None = None,
    pruning: Pruning | None = None,
    kernels: Kernels | None = None,
) -> Context:
    """`compress` that waits for nothing and raises nothing about numbers: `report.finite` tells.

    Pure, and compiled once per (shapes, policy); with `pruning`, once for each of a few lengths of its stages.

    Differentiable: the logits are those of the model's `forward`, and so are their derivatives. Kept keys and values
    have theirs where they are stored as they were computed; which tokens are kept, quantised and merged stores, and all
    that is reported, are constants.

    Args:
      model: a Flax module such as `vlm.model`.
      params: its parameters, a nested dict.
      batch: prompts, right-padded.
      policy: what to keep, `FullCache()` by default; or a `vlc.Recipe`, which says `prefill` and `pruning`, too.
      prefill: which keys the prompt's queries look at, `vlc.XAttention()` say; all by default. What a policy scores is
        the attention of its rows with all keys, whatever the pattern. With a pattern there is no derivative.
      pruning: which visual tokens go on from layer to layer, `vlc.PyramidDrop()` say; all by default. The policy then
        chooses from the tokens that each layer has; its budget still counts the prompt as it was given.
      kernels: which implementations to use; the platform's best by default.

    Returns:
      The context, of as many rows as the batch. Scores or logits that are not finite show in `report.finite`, and
      `report.density` is NaN in a layer whose scores are not, or, where evicted tokens are merged, whose keys or values
      are not.

    Raises:
      InputError: a malformed batch, or more positions than the model has (lengths are checked only outside `jit`, where
        they are known); or a row that keeps more visual tokens than `pruning.rooms` hold.
      PolicyError: a budget in bytes that holds less than one token a layer, lanes that do not divide the KV heads, or
        pruning that does not fit the model: cuts behind layers that it does not have, or layers with windows.

    Example:
      logits, state = vlc.prefill(vlm.model, vlm.params, batch, policy).start(max_new_tokens=64)
    """
    return run_prompts(model, params, batch, recipe_of(policy, prefill, pruning), 1, kernels)


def compress(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    policy: Policy | Recipe | None = None,
    *,
    prefill: Pattern | None = None,
    pruning: Pruning | None = None,
    kernels: Kernels | None = None,
) -> Context:
    """Runs prompts and keeps of their cache what the policy says, without room for answers. Pure, like `prefill`.

    A prompt may end anywhere. Where it ends before the question, choose a policy that needs none (docs/contexts.md).

    Args:
      model: a Flax module such as `vlm.model`.
      params: its parameters.
      batch: prompts, from `vlm.processor`.
      policy: what to keep, `FullCache()` by default; or a recipe.
      prefill, pruning: see `prefill`.
      kernels: which implementation of each op to use; the platform's best by default.

    Returns:
      The context, of as many rows as the batch.

    Raises:
      InputError, PolicyError: see `prefill`.
      NonFiniteError: scores or logits that are not finite, once all has run; see `generate`.

    Example:
      ctx = vlc.compress(vlm.model, vlm.params, batch, vlc.KeyDifference(budget=0.2))
    """
    recipe = recipe_of(policy, prefill, pruning)
    ctx = run_prompts(model, params, batch, recipe, 1, kernels)
    finite, density = ctx.report.finite, ctx.report.density
    require_finite(finite, ctx, dtype=model.spec.dtype, before=finite, density=density, policy=recipe.policy)
    return ctx


def run_prompts(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    recipe: Recipe,
    max_new_tokens: int,
    kernels: Kernels | None,
) -> Context:
    """`prefill`, if `max_new_tokens` have their place, too."""
    recipe = dataclasses.replace(recipe, policy=recipe.policy.settled(model.spec))
    policy, pattern = recipe.policy, recipe.prefill
    stages = check_prefill(model.spec, batch, recipe, max_new_tokens)
    if not policy.keeps_all:
        refuse_partly_checked()
    batch = placed(batch, params)
    with on_mesh_of(params, batch):
        ran = _prefill(model, params, batch, policy, pattern, stages, kernels or Kernels())
    logits, stores, next_position, lengths, allocation, finite, observed, tokens, told = ran
    report = make_report(model.spec, policy, stores, allocation, lengths, batch.length, finite, tokens)
    if pattern is not None:
        report = report.with_prefill(pattern, told, model.spec, stages)
    return Context(
        model=model,
        params=params,
        stores=stores,
        next_position=next_position,
        next_index=lengths,
        logits=logits,
        allocation=allocation,
        report=report,
        decoding=policy.rule,
        observed=observed,
    )


@partial(jax.jit, static_argnames=("model", "policy", "pattern", "plan", "kernels"))
@automatic
def _prefill(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    policy: Policy,
    pattern: Pattern | None,
    plan: Plan,
    kernels: Kernels,
) -> tuple[jax.Array, tuple[PackedStore, ...], jax.Array, jax.Array, Allocation, jax.Array, Any, jax.Array, Any]:
    """(logits, stores, next position, lengths, allocation, whether all was finite, what the rule remembers, tokens of
    the stages, what a pattern listed in each layer)."""
    embedded, spec = embed_prompt(model, params, batch, plan.needs_tower), model.spec
    lengths, next_position = (varying(jnp.asarray(x), params, batch) for x in (batch.lengths, embedded.next_position))
    vision_index = jnp.asarray(batch.vision_index)
    grid = None if plan.pruning is None and pattern is None else grid_of(spec, batch, jnp)
    prompt = Stage.of_prompt(embedded, lengths, vision_index, plan.sizes(spec.num_layers)[0], grid)
    said = prompt.repeated(next_position) if policy.repeats else prompt
    run = partial(run_stages, model, params, said, plan, tower=embedded.tower)
    keep = keep_all if policy.keeps_all or not spec.full_layers else keep_some
    rotate = partial(model.apply, {}, method="rotate")
    logits, stages, stores, allocation, observed, told = keep(run, rotate, spec, prompt, plan, policy, pattern, kernels)
    if policy.rule.contrast:
        last = jnp.take_along_axis(embedded.hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        logits = contrasted(model, params, logits, last, policy.rule.contrast)
    finite = finite_rows(logits) & jnp.all(jnp.isfinite(allocation.density), axis=1)
    tokens = jnp.stack([stage.lengths for stage in stages], axis=1)
    return logits, tuple(stores), next_position, lengths, allocation, finite, observed, tokens, told
