"""Checks before anything is traced or compiled."""

import dataclasses
import warnings
from collections.abc import Iterator

import numpy as np

from vlcache_jax.errors import InputError, PolicyError, PolicyWarning
from vlcache_jax.inference.recipe import Recipe, recipe_of
from vlcache_jax.inputs import Batch
from vlcache_jax.parallel.mesh import is_known
from vlcache_jax.patterns.attending import check_pattern
from vlcache_jax.policies.budget import budget_text
from vlcache_jax.policies.policy import Policy
from vlcache_jax.policies.scores.attention import Recency, Score
from vlcache_jax.policies.scores.pooling import GridPooled
from vlcache_jax.policies.shares import slot_budget
from vlcache_jax.policies.window import Window, forced
from vlcache_jax.pruning.plan import Plan, fitted, plan
from vlcache_jax.typing import ModelSpec


def check_recipe(spec: ModelSpec, recipe: Recipe) -> None:
    """Raises if a recipe does not fit a model.

    Raises:
      PolicyError: a policy whose lanes do not divide the model's KV heads, that pools scores over another patch grid,
        or rewrites what layers with windows keep; or see `check_pattern` and `fitted`.
    """
    policy = recipe.policy
    if recipe.prefill is not None:
        check_pattern(recipe.prefill, spec)
    if recipe.pruning is not None:
        fitted(recipe.pruning, spec)
    _check_grid(spec, policy)
    windows = [window for window in spec.windows if window is not None]
    if windows:
        try:
            policy.rule.check_windows(max(windows))
        except PolicyError as error:
            raise PolicyError(f"policy {policy.name!r}: {error}") from None
    if not spec.full_layers and policy.rule.rewrites_context:
        raise PolicyError(
            f"policy {policy.name!r}: {type(policy.rule).__name__} rewrites what layers keep, but all layers of this "
            "model have a window, which they keep as it is: use decoding=vlc.Append()"
        )
    if policy.sharing.per_head and spec.num_kv_heads % policy.lanes:
        raise PolicyError(
            f"policy {policy.name!r}: lanes={policy.lanes} do not divide the model's {spec.num_kv_heads} KV heads: "
            f"give a divisor of {spec.num_kv_heads}"
        )
    if not policy.keeps_all:
        try:
            policy.sharing.check_model(spec)
        except PolicyError as error:
            raise PolicyError(f"policy {policy.name!r}: {error}") from None


def check_prefill(spec: ModelSpec, batch: Batch, recipe: Policy | Recipe, max_new_tokens: int) -> Plan:
    """Raises if the arguments of a prefill cannot work; what is only known at run time is not checked under `jit`.

    Returns:
      Where visual tokens are dropped, and how long the stages are.

    Raises:
      PolicyError: see `recipe_of`, `check_recipe` and `plan`.
      InputError: max_new_tokens below 1, a malformed batch, more positions than the model has, or a row that keeps more
        tokens than the method's rooms hold.
    """
    recipe = recipe_of(recipe)
    check_recipe(spec, recipe)
    _check_batch(spec, batch, recipe.policy, max_new_tokens)
    return plan(recipe.pruning, spec, batch)


def _check_batch(spec: ModelSpec, batch: Batch, policy: Policy, max_new_tokens: int) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer):
        raise InputError(f"max_new_tokens={max_new_tokens!r} is not an integer")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} leaves no room for an answer: give at least 1")
    arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    shapes = {field: array.shape for field, array in arrays.items() if array is not None}
    if len({shape[0] for shape in shapes.values()}) != 1 or shapes["tokens"] != shapes["vision_index"]:
        raise InputError(
            f"the batch's arrays disagree on the number of rows or the length: {shapes}; build it with the processor"
        )
    if not is_known(batch.lengths):
        return
    lengths = np.asarray(batch.lengths)
    if lengths.min() < 1 or lengths.max() > batch.length:
        raise InputError(f"lengths {lengths.tolist()} must lie between 1 and the padded length {batch.length}")
    if policy.repeats and 2 * int(lengths.max()) > spec.max_positions:
        raise InputError(
            f"policy {policy.name!r} has prompts said twice: row {int(lengths.argmax())} needs "
            f"{2 * int(lengths.max())} positions but the model has {spec.max_positions}: shorten the prompt, or use "
            "another policy"
        )
    needed = int(lengths.max()) + int(max_new_tokens)
    if needed > spec.max_positions:
        raise InputError(
            f"row {int(lengths.argmax())} needs {needed} positions ({int(lengths.max())} prompt tokens + "
            f"{max_new_tokens} new ones) but the model has {spec.max_positions}: shorten the prompt, use fewer or "
            "smaller images, or lower max_new_tokens"
        )
    if spec.full_layers and not policy.keeps_all and not isinstance(policy.score, Recency):
        _warn_of_forced_tokens(spec, policy, lengths)


def _warn_of_forced_tokens(spec: ModelSpec, policy: Policy, lengths: np.ndarray) -> None:
    """Warns if window and sinks leave the scores nothing, or if a `Window` was made smaller lest it do.

    The text is the same for every batch, so that Python's default filter shows it once.
    """
    lanes = policy.lanes if policy.sharing.per_head else None
    budget = slot_budget(policy.budget, spec, lanes, policy.bits, policy.evicted.bits)
    means = [budget.total(int(n)) // budget.layers for n in lengths]  # slots of a layer on average
    means = [mean for mean, n in zip(means, lengths) if 1 < mean < n]
    start = f"{policy.name}: at a budget of {budget_text(policy.budget)} and prompts of this length"
    forced_tokens = {(policy.recent, policy.sinks), policy.rule.forced or (policy.recent, policy.sinks)}
    for recent, sinks in forced_tokens:
        if isinstance(recent, Window):
            if any(recent.of(mean) < recent.count for mean in means):
                text = (
                    f"{start} a layer has fewer than {2 * recent.count} slots, of which a window of {recent.count} "
                    "recent tokens would take more than half: fewer are kept, so that the scores have a say; see "
                    f"vlc.Window. recent=0.1 keeps a tenth at any length, recent=vlc.Tokens({recent.count}) all of them"
                )
                warnings.warn(text, PolicyWarning, stacklevel=5)
        elif any(sum(forced(mean, recent, sinks)) >= mean for mean in means):
            text = (
                f"{start} recent={recent} and sinks={sinks} take all slots of a layer, and the scores decide nothing: "
                "raise the budget, or lower recent or sinks"
            )
            warnings.warn(text, PolicyWarning, stacklevel=5)


def _check_grid(spec: ModelSpec, policy: Policy) -> None:
    for score in _with_inner(policy.score):
        if not isinstance(score, GridPooled) or spec.vision_grid is None or score.side == spec.vision_grid:
            continue
        if spec.vision_grid == 0:
            raise PolicyError(
                f"{policy.name}: grid_side={score.side}, but the visual tokens of this model are no grid of patches (a "
                "class token is among them): leave grid_side out to pool in the sequence"
            )
        raise PolicyError(
            f"{policy.name}: grid_side={score.side}, but this model has {spec.vision_grid} patches along one side of a "
            f"tile: use grid_side={spec.vision_grid}"
        )


def _with_inner(score: Score) -> Iterator[Score]:
    """A score and those it is made of."""
    yield score
    if dataclasses.is_dataclass(score):
        for field in dataclasses.fields(score):
            inner = getattr(score, field.name)
            if isinstance(inner, Score):
                yield from _with_inner(inner)
