"""The host's table of rows: whose answer each one holds, and what has come of it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from vlcache_jax.engine.preparing import Read
from vlcache_jax.engine.requests import Result

Decode = Callable[[Sequence[int]], str]
"""Token ids to their text."""


@dataclasses.dataclass
class Answer:
    """One answer, from the prefill of its prompt to its end.

    Attributes:
      read: its request.
      question: which of the request's.
      sample: which of the request's.
      of: row of the micro-batch.
      kept: f32 [rows of the micro-batch].
      steps: tokens so far.
      started: when its row began.
    """

    read: Read
    question: int
    sample: int
    of: int
    kept: jax.Array
    steps: int = 0
    started: float = 0.0


def result(answer: Answer, tokens: np.ndarray, done: bool, finite: bool, decode: Decode | None) -> Result | None:
    """The result of a row, or None if it is to go on.

    Args:
      answer: of the row.
      tokens: i32 [n], so far.
      done: whether it has ended on the device.
      finite: whether it means anything.
      decode: of the processor.
    """
    request, stop_ids = answer.read.request, answer.read.options.stop_ids[answer.sample]  # type: ignore[union-attr]
    finish: Literal["stop", "length"] = "stop" if len(tokens) and tokens[-1] in stop_ids else "length"
    text = None
    if decode is not None and (done or request.stop):
        text = decode(tokens.tolist())
        if any(stop in text for stop in request.stop):
            tokens, text = _cut(tokens, request.stop, decode)
            finish, done = "stop", True
    if not done and finite:
        return None
    fields: dict[str, Any] = {
        "index": answer.read.index,
        "question": answer.question,
        "sample": answer.sample,
        "answers": len(answer.read.questions) * request.samples,
        "id": request.id,
        "prompt_tokens": answer.read.tokens,
        "seconds": time.monotonic() - answer.started,
    }
    if not finite:
        reason = "NonFiniteError: scores or logits are NaN or infinite, so that no token can be told from another"
        return Result(finish="failed", tokens=tokens[:0], reason=reason, **fields)
    kept = float(np.asarray(answer.kept)[answer.of])
    return Result(finish=finish, tokens=tokens, text=text, kept_fraction=kept, **fields)


def _cut(tokens: np.ndarray, stops: Sequence[str], decode: Decode) -> tuple[np.ndarray, str]:
    """The tokens up to the one with which the first stop text was there, and the text before it.

    Whatever was decoded behind it before the host looked is gone: the answer depends on nothing but its tokens.
    """
    for count in range(1, len(tokens) + 1):
        text = decode(tokens[:count].tolist())
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            break
    return tokens[:count], text[: min(places)]


def failure(read: Read) -> Result:
    """The result of a request that could not be read."""
    return Result(
        index=read.index,
        question=0,
        sample=0,
        id=getattr(read.request, "id", None),
        finish="failed",
        tokens=np.zeros(0, np.int32),
        reason=read.reason,
    )
