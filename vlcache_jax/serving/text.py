"""The text of an answer while it grows."""

from collections.abc import Sequence

from vlcache_jax.models.text.text_stream import TextStream


class Delta:
    """Hands out the text of an answer in pieces, never one of a stop text, which the answer will not have.

    Args:
      stream: of the tokenizer.
      stops: texts that end the answer.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str]) -> None:
        self._stream, self._stops, self._text = stream, stops, ""
        self._tokens = self._sent = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that has become certain, of all tokens so far."""
        for token in tokens[self._tokens :]:
            self._text += self._stream.push(token)
        self._tokens = len(tokens)
        held = max((_begun(self._text, stop) for stop in self._stops), default=0)
        return self._until(len(self._text) - held, self._text)

    def finish(self, text: str) -> str:
        """What is left of the whole text."""
        return self._until(len(text), text)

    def _until(self, end: int, text: str) -> str:
        piece, self._sent = text[self._sent : end], max(self._sent, end)
        return piece


def _begun(text: str, stop: str) -> int:
    """How much of a stop text the end of a text may be."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
