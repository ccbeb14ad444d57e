"""How likely given answers are, of many prompts: what lmms-eval's multiple choice compares."""

from collections.abc import Sequence

import numpy as np

from vlcache_jax.engine.buckets import fit
from vlcache_jax.engine.engine import MOST_BUCKETS
from vlcache_jax.engine.preparing import Preparer
from vlcache_jax.engine.requests import Request
from vlcache_jax.errors import InputError
from vlcache_jax.evaluation.batches import in_batches, read_all
from vlcache_jax.inference.prefill import compress
from vlcache_jax.inference.recipe import Recipe, recipe_of
from vlcache_jax.inference.score import score
from vlcache_jax.inputs import Continuation
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.models.text.buckets import bucket_length
from vlcache_jax.policies.policy import Policy


def losses(
    vlm: VLM, recipe: Policy | Recipe, requests: Sequence[Request], answers: Sequence[Sequence[str]]
) -> list[list[tuple[float, bool]]]:
    """The mean negative log-likelihood of a token, and whether greedy decoding gives the answer, of each answer.

    A prompt is read and compressed once for all its answers, and in a batch whose size depends on its bucket alone.

    Args:
      vlm: the loaded checkpoint.
      recipe: what to keep of the prompts' caches.
      requests: the prompts.
      answers: at least one for each.

    Raises:
      InputError: a prompt that cannot be read, an answer without tokens.
    """
    known = [vlm.processor.continuation([list(own)]) for own in answers]
    if not all(np.asarray(one.lengths).all() for one in known):
        raise InputError("an answer has no tokens: give texts that are not empty")
    longest = max(int(np.max(one.lengths)) for one in known)
    shape = (max(map(len, answers)), bucket_length(longest))
    preparer = Preparer(vlm.processor, vlm.model, recipe_of(recipe), shape[1], 0, 8)
    prompts = [Request(prompt=request.prompt, images=request.images) for request in requests]
    buckets = fit([read.bucket for read in read_all(preparer, prompts)], MOST_BUCKETS)
    found: list[list[tuple[float, bool]]] = [[] for _ in requests]
    for reads, batch in in_batches(preparer, vlm.params, prompts, buckets):
        some = [read.index for read in reads]
        filled = some + some[:1] * (batch.size - len(some))
        scores = score(compress(vlm.model, vlm.params, batch, recipe), _together(filled, known, shape))
        means, greedy = np.asarray(scores.mean), np.all(np.asarray(scores.greedy), axis=-1)
        for row, index in enumerate(some):
            found[index] = [(-float(means[row, i]), bool(greedy[row, i])) for i in range(len(answers[index]))]
    return found


def _together(indices: Sequence[int], known: Sequence[Continuation], shape: tuple[int, int]) -> Continuation:
    """The answers to some prompts, the first of each repeated to one number, padded to one length."""
    tokens = np.zeros((len(indices), *shape), np.int32)
    lengths = np.zeros((len(indices), shape[0]), np.int32)
    for row, index in enumerate(indices):
        of_row, sizes = np.asarray(known[index].tokens)[0], np.asarray(known[index].lengths)[0]
        for i in range(shape[0]):
            j = i if i < len(sizes) else 0
            tokens[row, i, : sizes[j]], lengths[row, i] = of_row[j, : sizes[j]], sizes[j]
    return Continuation(tokens, lengths)
