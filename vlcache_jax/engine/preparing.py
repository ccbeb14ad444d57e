"""From a request to what the device takes: on the host, in numpy, and without raising anything."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vlcache_jax.engine.buckets import Bucket, pad, smallest
from vlcache_jax.engine.requests import Request
from vlcache_jax.errors import InputError, VLCacheError
from vlcache_jax.inference.context import check_count
from vlcache_jax.inference.recipe import Recipe
from vlcache_jax.inference.row_options import RowOptions, row_options
from vlcache_jax.inference.validation import check_prefill
from vlcache_jax.inputs import Batch, Continuation
from vlcache_jax.parallel.seeds import seed_words

NO_SIZE = Bucket(0, 0)


@dataclasses.dataclass(frozen=True)
class Read:
    """A request that is ready for the device, or why it never will be.

    Attributes:
      index: how many requests came before.
      request: as it was given.
      batch: one row; None if it failed.
      bucket: that the row is padded to, or the row's own size if it is not yet.
      options: of its samples, in numpy.
      questions: token ids that follow the prompt, i32 [n] each; one without any, if there are no questions.
      tokens: of the prompt.
      reason: why it failed.
      refused: whether that is the request's fault.
    """

    index: int
    request: Request
    batch: Batch | None = None
    bucket: Bucket = NO_SIZE
    options: RowOptions | None = None
    questions: tuple[np.ndarray, ...] = ()
    tokens: int = 0
    reason: str | None = None
    refused: bool = False

    def failed(self, error: Exception) -> "Read":
        """The same, but that it never will be."""
        return Read(self.index, self.request, reason=reason(error), refused=isinstance(error, InputError))

    @property
    def complaint(self) -> str:
        """The reason, as an InputError says it."""
        name = self.index if self.request.id is None else self.request.id
        return f"sample {name!r}: {(self.reason or '').removeprefix('InputError: ')}"


@dataclasses.dataclass(frozen=True)
class Preparer:
    """What requests are held to.

    Attributes:
      processor: of the checkpoint, or None.
      model: of the engine.
      recipe: of the engine.
      max_new_tokens: the most.
      question_tokens: the most of a question; 0 of an engine that takes none.
      stop_ids: the most of an answer.
      top_log_probabilities: the most.
    """

    processor: Any
    model: Any
    recipe: Recipe
    max_new_tokens: int
    question_tokens: int
    stop_ids: int
    top_log_probabilities: int = 0

    def read(self, index: int, request: Request) -> Read:
        """A request's own row, not padded to a bucket."""
        try:
            if not isinstance(request, Request):
                raise InputError(f"a request is a {type(request).__name__}: give a vlc.Request")
            options = self._options(request)
            batch = self._batch(request)
            questions = self._questions(request)
            following = int(options.max_new_tokens[0]) + max(map(len, questions))
            check_prefill(self.model.spec, batch, self.recipe, following)
            return Read(index, request, batch, Bucket.of(batch, self.model), options, questions, int(batch.lengths[0]))
        except Exception as error:
            return Read(index, request).failed(error)

    def padded(self, read: Read, buckets: Sequence[Bucket]) -> Read:
        """The same, padded to the smallest of the buckets that holds it."""
        if read.batch is None:
            return read
        try:
            bucket = smallest(buckets, read.bucket)
            batch = pad(read.batch, bucket.shapes(self.model, 1))
            return dataclasses.replace(read, batch=batch, bucket=bucket)
        except InputError as error:
            return read.failed(error)

    def _batch(self, request: Request) -> Batch:
        prompt = request.prompt
        if isinstance(prompt, Batch):
            if prompt.size != 1:
                raise InputError(f"the prompt is a batch of {prompt.size} rows: give one request for each")
            return jax.tree.map(np.asarray, prompt)
        if self.processor is None:
            raise InputError("the engine has no processor: give prompts as batches of one row")
        images = list(request.images)
        if isinstance(prompt, str):
            return self.processor([images], [prompt])
        return self.processor.chat([list(prompt)], images=[images] if images else None)

    def _questions(self, request: Request) -> tuple[np.ndarray, ...]:
        questions = request.questions
        if not isinstance(questions, Continuation):
            if isinstance(questions, str):
                raise InputError(f"questions={questions!r}: give a list of texts")
            if not questions:
                return (np.zeros(0, np.int32),)
            if self.processor is None:
                raise InputError("the engine has no processor: give questions as a vlc.Continuation")
            questions = self.processor.continuation(list(questions))
        tokens, lengths = np.asarray(questions.tokens, np.int32), np.asarray(questions.lengths).reshape(-1)
        found = tuple(row[:n] for row, n in zip(tokens.reshape(-1, tokens.shape[-1]), lengths, strict=True))
        longest = max(map(len, found), default=0)
        if longest > self.question_tokens:
            raise InputError(
                f"a question of {longest} tokens is longer than the engine's question_tokens={self.question_tokens}: "
                "shorten it, or give the engine a larger number"
            )
        return found

    def _options(self, request: Request) -> RowOptions:
        check_count("samples", request.samples)
        if request.samples > 1 and request.sampling is None:
            raise InputError(f"samples={request.samples} greedy answers would be the same: give sampling=Sampling()")
        most = self.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        check_count("max_new_tokens", most)
        if most > self.max_new_tokens:
            raise InputError(f"max_new_tokens={most} is more than the engine's {self.max_new_tokens}")
        if isinstance(request.stop, str) or not all(isinstance(text, str) and text for text in request.stop):
            raise InputError(f"stop={request.stop!r}: give a list of texts that are not empty")
        if request.stop and self.processor is None:
            raise InputError("stop texts need a processor, which the engine has none of: give eos_token_ids")
        n, stop_ids = request.samples, request.eos_token_ids
        seeds = _following(np.asarray(jax.device_get(seed_words(request.seed, (), what="a request"))), n)
        top, most_top = request.top_log_probabilities, self.top_log_probabilities
        if not isinstance(top, int) or not 0 <= top <= most_top:
            raise InputError(f"top_log_probabilities={top!r} is not between 0 and the engine's {most_top}")
        logs = request.log_probabilities or top > 0
        return row_options(self.model.spec, n, int(most), request.sampling, seeds, stop_ids, self.stop_ids, logs)


def _following(words: np.ndarray, count: int) -> np.ndarray:
    """The seeds from one on, u32 [2] -> u32 [count, 2], as `vlc.answer` has them for samples; in numpy."""
    high, low = words.astype(np.uint64)
    numbers = (high << np.uint64(32) | low) + np.arange(count, dtype=np.uint64)
    return np.stack([numbers >> np.uint64(32), numbers & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)


def reason(error: Exception) -> str:
    """An error in one line; of the library's own, whose texts say all, with the class that a user would catch."""
    kind = type(error).__name__
    return f"{kind}: {error}" if isinstance(error, VLCacheError | OSError) else f"{kind}, not expected here: {error}"
