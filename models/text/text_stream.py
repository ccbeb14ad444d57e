"""Text from tokens that come one at a time."""

from collections.abc import Callable, Collection, Sequence

_UNFINISHED = "\ufffd"  # what tokenizers write for bytes that are no character, or not yet one


class TextStream:
    """Decodes token by token. What `push` and at last `finish` return, joined, is the text of all tokens.

    A character can take several tokens: `push` returns the text that has become certain, "" within a character. A token
    that ends an answer returns what is left, and so does `finish` for an answer that was cut; what follows is ignored.
    A batch takes one stream for each row.

        stream = tokenizer.decode_stream()
        for token in tokens:
            print(stream.push(token), end="")
        print(stream.finish())
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], end_ids: Collection[int] = ()) -> None:
        self._decode = decode
        self._end_ids = frozenset(end_ids)
        self._ids: list[int] = []
        # Decoders look at their neighbours (a first space is dropped, for instance), so a token is decoded together
        # with those before it: ids[context:shown] gave the last text, ids[shown:] is new.
        self._context = self._shown = 0
        self._ended = False

    def push(self, token_id: int) -> str:
        """Takes the next token id and returns the new text."""
        if self._ended:
            return ""
        self._ids.append(int(token_id))
        if self._ids[-1] in self._end_ids:
            return self.finish()
        text = self._new_text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """Ends the stream and returns the text held back, such as half a character, as `Processor.decode` writes it."""
        if self._ended:
            return ""
        self._ended = True
        return self._new_text()

    def _new_text(self) -> str:
        shown = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(shown) :]
