"""The objects of OpenAI's chat API."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from vlcache_jax.engine.requests import Result
from vlcache_jax.models.text.tokenizer import Tokenizer


class Reply:
    """Makes the objects of one reply.

    Args:
      model: that answers.
      tokenizer: of the checkpoint.
    """

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def completion(self, results: Sequence[Result], choices: int) -> dict[str, Any]:
        """The whole reply: each result `choices` times."""
        found = [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": self.logprobs(result),
                "finish_reason": result.finish,
            }
            for index, result in enumerate(result for result in results for _ in range(choices))
        ]
        return {**self._common, "object": "chat.completion", "choices": found, "usage": usage(results, choices)}

    def logprobs(self, result: Result, since: int = 0) -> dict[str, Any] | None:
        """Of the tokens from `since` on; None unless they were asked for."""
        if result.log_probabilities is None:
            return None
        tops: list[list[Any]] = [[]] * len(result.tokens)
        if result.top_tokens is not None and result.top_log_probabilities is not None:
            pairs = zip(result.top_tokens.tolist(), result.top_log_probabilities.tolist(), strict=True)
            tops = [list(zip(*pair)) for pair in pairs]
        chosen = zip(result.tokens.tolist(), result.log_probabilities.tolist(), tops, strict=True)
        content = [
            self._likely(token, log) | {"top_logprobs": [self._likely(*one) for one in top]}
            for token, log, top in list(chosen)[since:]
        ]
        return {"content": content, "refusal": None}

    def _likely(self, token: int, log: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        whole = "\ufffd" not in text  # else it is a part of a character
        return {"token": text, "logprob": log, "bytes": list(text.encode()) if whole else None}

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        """A piece of one choice."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}

    def last(self, results: Sequence[Result], choices: int) -> dict[str, Any]:
        """The end of a stream that was asked for the numbers of tokens."""
        used = usage(results, choices)
        return {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": used}


def usage(results: Sequence[Result], choices: int) -> dict[str, int]:
    """Tokens of the prompt, which was read once, and of all answers."""
    prompt, answers = results[0].prompt_tokens, choices * sum(len(result.tokens) for result in results)
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


def models(name: str, since: int) -> dict[str, Any]:
    """The list of the one model that is served."""
    return {"object": "list", "data": [model(name, since)]}


def model(name: str, since: int) -> dict[str, Any]:
    """The model that is served."""
    return {"id": name, "object": "model", "created": since, "owned_by": "vlcache_jax"}
