"""What is asked of an engine, and what it gives back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vlcache_jax.inference.sampling import Sampling
from vlcache_jax.inputs import Batch, Continuation
from vlcache_jax.models.text.arguments import Visual
from vlcache_jax.parallel.seeds import Seeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, and how it is to be answered.

    Attributes:
      prompt: a text with one image token for each image; or a conversation, a list of messages as `Processor.chat`
        takes it; or a batch of one row from the processor.
      images: of the prompt, and videos, as the processor takes them. They are opened when their turn comes.
      id: anything; comes back with the result.
      max_new_tokens: answers are cut at this length; that of the engine by default, which is the most.
      questions: texts that follow the prompt, each to be answered by itself, as `Processor.continuation` takes them; or
        what it returns. They share one prefill, for engines with `question_tokens`. Empty: the prompt is answered.
      samples: answers to draw to the prompt, or to each question. They share one prefill, and sample i draws with
        seed + i.
      sampling: None for greedy decoding.
      seed: an integer or a key, as in `vlc.generate`.
      eos_token_ids: ids that end an answer; those of the checkpoint by default. An empty sequence never stops.
      stop: texts that end an answer; they are no part of its text.
      log_probabilities: return those of the tokens, too.
      top_log_probabilities: and so many of the likeliest tokens in the place of each, as `Engine` has room for.
      follow: for streams, and to give an answer up. Called by the thread that runs the engine, so it must be quick,
        with the answer so far, a `Result` whose `finish` is "running": without tokens while the prompt waits, and then
        whenever the host looks at the rows (`Engine(steps=...)`). Once it returns False, the answer is "cancelled" and
        its row free.

    Example:
      vlc.Request(prompt="USER: <image>\\nWhat is this? ASSISTANT:", images=["cat.jpg"], max_new_tokens=32)
    """

    prompt: str | Sequence[Mapping[str, Any]] | Batch
    images: Sequence[Visual] = ()
    id: Any = None
    max_new_tokens: int | None = None
    questions: Sequence[str] | Continuation = ()
    samples: int = 1
    sampling: Sampling | None = None
    seed: Seeds = 0
    eos_token_ids: Sequence[int] | None = None
    stop: Sequence[str] = ()
    log_probabilities: bool = False
    top_log_probabilities: int = 0
    follow: "Callable[[Result], bool | None] | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One answer, or why there is none.

    Attributes:
      index: how many requests came before its own.
      question: which of the request's questions; 0 without any.
      sample: which of the request's samples.
      answers: how many results the request has: questions times samples, or 1 if it was not read.
      id: the request's.
      finish: "stop" (a stop id or text), "length", "failed", "cancelled" (`Request.follow`), or, of what `follow` is
        given, "running".
      tokens: i32 [n], the stop id included; up to the token with which a stop text was there.
      text: the answer without special tokens and stop text; None of one that did not end, and of an engine without a
        processor.
      log_probabilities, sampling_log_probabilities: f32 [n], of the tokens, as `vlc.Generation` has them; None unless
        they were asked for.
      top_tokens, top_log_probabilities: i32 and f32 [n, k], the likeliest tokens in the place of each, in falling
        order, and their log-probabilities under the model, before any temperature; None unless they were asked for.
      reason: why it failed; None if it did not.
      refused: whether it failed because of what it asks, an `InputError`.
      prompt_tokens: of the prompt; 0 if it could not be read.
      kept_fraction, exact: of the prompt's cache, see `vlc.Report`.
      seconds: from the row's start to the end of the answer.
    """

    index: int
    question: int
    sample: int
    id: Any
    finish: Literal["stop", "length", "failed", "cancelled", "running"]
    tokens: np.ndarray
    text: str | None = None
    log_probabilities: np.ndarray | None = None
    sampling_log_probabilities: np.ndarray | None = None
    top_tokens: np.ndarray | None = None
    top_log_probabilities: np.ndarray | None = None
    reason: str | None = None
    refused: bool = False
    answers: int = 1
    prompt_tokens: int = 0
    kept_fraction: float | None = None
    exact: bool | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.finish in ("stop", "length")
