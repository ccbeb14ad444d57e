"""How likely given answers are, of many prompts: what lmms-eval's multiple choice compares."""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vlcache_jax.engine.buckets import Bucket, fit
from vlcache_jax.engine.engine import MOST_BUCKETS, PREFILL_TOKENS
from vlcache_jax.engine.preparing import Preparer
from vlcache_jax.engine.programs import stacked
from vlcache_jax.engine.requests import Request
from vlcache_jax.errors import InputError
from vlcache_jax.inference.prefill import compress
from vlcache_jax.inference.score import score
from vlcache_jax.inputs import Continuation
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.models.text.buckets import bucket_length
from vlcache_jax.policies.policy import Policy


def losses(
    vlm: VLM, policy: Policy, requests: Sequence[Request], answers: Sequence[Sequence[str]]
) -> list[list[tuple[float, bool]]]:
    """The mean negative log-likelihood of a token, and whether greedy decoding gives the answer, of each answer.

    A prompt is read and compressed once for all its answers, and in a batch whose size depends on its bucket alone.

    Args:
      vlm: the loaded checkpoint.
      policy: what to keep of the prompts' caches.
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
    preparer = Preparer(vlm.processor, vlm.model, policy, shape[1], 0, 8)

    def read(index: int) -> Any:
        found = preparer.read(index, Request(prompt=requests[index].prompt, images=requests[index].images))
        if found.reason is not None:
            raise InputError(found.reason)
        return found

    with ThreadPoolExecutor() as pool:
        sizes: list[Bucket] = list(pool.map(lambda index: read(index).bucket, range(len(requests))))
        buckets = fit(sizes, MOST_BUCKETS)
        of = [next(bucket for bucket in buckets if bucket.holds(size)) for size in sizes]
        found: list[list[tuple[float, bool]]] = [[] for _ in requests]
        for bucket, group in itertools.groupby(sorted(range(len(requests)), key=of.__getitem__), of.__getitem__):
            rows = max(1, PREFILL_TOKENS // bucket.tokens)
            own = list(group)
            for start in range(0, len(own), rows):
                some = own[start : start + rows]
                reads = [preparer.padded(one, [bucket]) for one in pool.map(read, some)]
                batch = stacked([one.batch for one in reads if one.batch is not None], rows)
                filled = some + some[:1] * (rows - len(some))
                scores = score(compress(vlm.model, vlm.params, batch, policy), _together(filled, known, shape))
                means, greedy = np.asarray(scores.mean), np.all(np.asarray(scores.greedy), axis=-1, keepdims=True)
                for row, index in enumerate(some):
                    count = len(answers[index])
                    found[index] = [(-float(means[row, i]), bool(greedy[row, i, 0])) for i in range(count)]
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
