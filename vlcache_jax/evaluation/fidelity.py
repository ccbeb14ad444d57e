"""What a policy changes of the distributions of tokens, along the answers of the one it is compared with.

No right answer is needed, and far fewer samples than for a difference of scores: every token of every answer counts.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlcache_jax.engine.buckets import check_buckets
from vlcache_jax.engine.preparing import Preparer
from vlcache_jax.engine.requests import Request
from vlcache_jax.errors import PolicyError
from vlcache_jax.evaluation.batches import in_batches
from vlcache_jax.evaluation.run_folder import RunFolder
from vlcache_jax.inference.divergence import divergence
from vlcache_jax.inference.prefill import compress
from vlcache_jax.inference.recipe import Recipe
from vlcache_jax.inputs import Continuation
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.policies.policy import Policy
from vlcache_jax.terminal.progress import Progress

_DIGITS = 6
"""Of what is written: rounding hides what the place of a row in its batch may do to the last bits."""


def check_policies(policies: Iterable[Policy]) -> None:
    """Raises PolicyError for one whose contexts nothing can be appended to."""
    for policy in policies:
        if policy.rule.rewrites_context:
            raise PolicyError(
                f"policy {policy.name!r} has the rule decoding={policy.rule}, which rewrites what was kept: its "
                "divergence along another's answer cannot be told; leave divergence out, or use decoding=Append()"
            )


def measure(
    vlm: VLM,
    folder: RunFolder,
    recipes: Mapping[str, Recipe],
    compare: str,
    own: Sequence[str],
    requests: Callable[[], Iterable[Request]],
    options: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Adds a line for each sample and policy to the folder, where there is none yet.

    Args:
      vlm: the loaded checkpoint.
      folder: with the answers of `compare`.
      recipes: by their names, that one included.
      compare: whose answers are followed, and whose distributions are the reference.
      own: ids of the samples that are this program's.
      requests: of all samples.
      options: of the engine that answered, of which `kernels` is used.
      progress: gets a step.
    """
    answers = {key: line["token_ids"] for key, line in folder.results(compare).items() if line["status"] == "ok"}
    left = {name: {*own} & {*answers} - {*folder.divergences(name, compare)} for name in recipes if name != compare}
    asked = set().union(*left.values())
    if not asked:
        return
    room = max(map(len, answers.values()))
    preparer = Preparer(vlm.processor, vlm.model, recipes[compare], room, 0, 8)
    kernels = options.get("kernels")
    buckets = check_buckets(folder.buckets())
    progress.step(f"along the answers of {compare}", total=len(asked))
    wanted = (dataclasses.replace(request, max_new_tokens=room) for request in requests() if request.id in asked)
    for reads, batch in in_batches(preparer, vlm.params, wanted, buckets):
        ids = [read.request.id for read in reads]
        followed = _continuation([answers[key] for key in ids], batch.size, room)
        reference = compress(vlm.model, vlm.params, batch, recipes[compare], kernels=kernels)
        for name, missing in left.items():
            kept = compress(vlm.model, vlm.params, batch, recipes[name], kernels=kernels)
            found = divergence(reference, kept, followed, kernels=kernels)
            means, shares = np.asarray(found.mean), np.asarray(found.agreement)
            for row, key in enumerate(ids):
                if key in missing:
                    numbers = {"kl": float(means[row]), "same_next": float(shares[row])}
                    line = {"id": key, **{name: round(x, _DIGITS) for name, x in numbers.items()}}
                    folder.add_divergence(name, compare, line)
        progress.advance(len(reads))


def _continuation(answers: Sequence[Sequence[int]], rows: int, room: int) -> Continuation:
    """Answers padded to one length, the first one again for the rows that are left."""
    answers = [*answers, *[answers[0]] * (rows - len(answers))]
    tokens = np.zeros((rows, room), np.int32)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer)] = answer
    return Continuation(tokens, np.array([len(answer) for answer in answers], np.int32))
