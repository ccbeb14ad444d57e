"""The host's table of rows: whose answer each one holds, and what has come of it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from vlcache_jax.engine.preparing import Read, reason
from vlcache_jax.engine.requests import Result

Decode = Callable[[Sequence[int]], str]
"""Token ids to their text."""

Logs = tuple[np.ndarray, ...]
"""Of a row's tokens: log-probabilities under the model and as they were drawn, f32 [room] each; and perhaps the
likeliest tokens, i32 [room, n], and their log-probabilities, f32."""

NONE = np.zeros(0, np.int32)


@dataclasses.dataclass
class Answer:
    """One answer, from the prefill of its prompt to its end.

    Attributes:
      read: its request.
      question: which of the request's.
      sample: which of the request's.
      of: row of the micro-batch.
      kept: `kept_fraction` and `exact` of the report, [rows of the micro-batch].
      steps: tokens so far.
      started: when its row began; None before.
    """

    read: Read
    question: int
    sample: int
    of: int
    kept: tuple[jax.Array, jax.Array] | None
    steps: int = 0
    started: float | None = None


def result(
    answer: Answer, tokens: np.ndarray, logs: Logs, done: bool, finite: bool, decode: Decode | None
) -> Result | None:
    """The result of a row, or None if it is to go on.

    Args:
      answer: of the row.
      tokens: i32 [n], so far.
      logs: of the row.
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
    if not finite:
        why = "NonFiniteError: scores or logits are NaN or infinite, so that no token can be told from another"
        return Result(finish="failed", tokens=tokens[:0], reason=why, **_fields(answer))
    assert answer.kept is not None
    fraction, exact = (np.asarray(x)[answer.of].item() for x in answer.kept)
    kept = {"kept_fraction": fraction, "exact": exact}
    return Result(finish=finish, tokens=tokens, text=text, **kept, **_fields(answer, len(tokens), logs))


def given_up(answer: Answer, tokens: np.ndarray = NONE, logs: Logs = (NONE, NONE)) -> Result | None:
    """The result of an answer that is not wanted any more, or None if it is to go on: asks the request's `follow`.

    Args:
      answer: whose row, or turn, it is.
      tokens: i32 [n], so far.
      logs: of its row.
    """
    follow = answer.read.request.follow
    if follow is None:
        return None
    so_far = Result(finish="running", tokens=tokens, **_fields(answer, len(tokens), logs))
    try:
        if follow(so_far) is not False:
            return None
    except Exception as error:
        return dataclasses.replace(so_far, finish="failed", tokens=NONE, reason=f"follow raised {reason(error)}")
    return dataclasses.replace(so_far, finish="cancelled", reason="given up: its follow returned False")


def dropped(read: Read) -> Result | None:
    """The only result of a request that is not wanted any more before it was its turn; None if it waits on."""
    result = given_up(Answer(read, 0, 0, 0, None))
    return result and dataclasses.replace(result, answers=1)


def _fields(answer: Answer, count: int = 0, logs: Logs = (NONE, NONE)) -> dict[str, Any]:
    request = answer.read.request
    names = ("log_probabilities", "sampling_log_probabilities") if request.log_probabilities else ()
    top = ("top_tokens", "top_log_probabilities") if request.top_log_probabilities else ()
    return {
        **{name: of_row[:count].copy() for name, of_row in zip(names, logs)},
        **{name: of_row[:count, : request.top_log_probabilities].copy() for name, of_row in zip(top, logs[2:])},
        "index": answer.read.index,
        "question": answer.question,
        "sample": answer.sample,
        "answers": len(answer.read.questions) * request.samples,
        "id": request.id,
        "prompt_tokens": answer.read.tokens,
        "seconds": 0.0 if answer.started is None else time.monotonic() - answer.started,
    }


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
        tokens=NONE,
        reason=read.reason,
        refused=read.refused,
    )
