"""A checkpoint's `tokenizer.json`, run as transformers' fast tokenizers run it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.models.processing.files import read_json, read_text

NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Special tokens that every tokenizer may have."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      special_tokens: the named special tokens, such as {"bos_token": "<s>", "image_token": "<image>"}.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str] | None = None) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        # A tokenizer.json may carry the padding and truncation of its last use; neither belongs to the model.
        backend.no_padding()
        backend.no_truncation()

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Reads `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

        Special tokens that only the latter two know are added, and a beginning-of-sequence token is prepended
        if the post-processor of `tokenizer.json` says so (`add_bos_token` does not count): as `AutoTokenizer`
        of transformers 5 does for LLaVA checkpoints.

        Raises CheckpointError if `tokenizer.json` is missing or one of the files is malformed.
        """
        text = read_text(folder, "tokenizer.json")
        if text is None:
            raise CheckpointError(
                f"{folder} has no tokenizer.json: write one with transformers, by "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}), which "
                "converts a tokenizer.model or vocab.json to a fast tokenizer"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(f"{folder / 'tokenizer.json'} is no valid tokenizer ({error})") from error
        config = read_json(folder, "tokenizer_config.json") or {}
        try:
            special_tokens = _add_tokens(backend, config, folder)
        except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'} has malformed special tokens ({error}): download it again"
            ) from error
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        return cls(backend, special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token(self) -> str | None:
        """The token that starts a sequence."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a sequence."""
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int:
        """The id of the padding token; without one, that of the end of a sequence; without either, 0."""
        for token_id in (self._named_id("pad_token"), self.eos_token_id):
            if token_id is not None:
                return token_id
        return 0

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, or None if the vocabulary lacks it."""
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id, or None if the vocabulary lacks it."""
        return self.backend.id_to_token(token_id)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` also those that start or end a sequence."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError) as error:
            raise InputError(
                f"the text {text[:80]!r} cannot be tokenised ({error}): give a str of valid Unicode"
            ) from error

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids beyond the vocabulary (rows that pad an embedding) give nothing."""
        ids = [int(token_id) for token_id in token_ids]
        try:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise InputError(
                f"token ids from {min(ids)} to {max(ids)} cannot be decoded: they must be at least 0"
            ) from error

    def decode_stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """A decoder that takes tokens one at a time."""
        return TextStream(self, skip_special_tokens)


class TextStream:
    """Decodes token by token: `push` returns the text that has become certain, "" within a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._backend = tokenizer.backend
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def push(self, token_id: int) -> str:
        """Takes the next token id and returns the new text."""
        return self._stream.step(self._backend, int(token_id)) or ""


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Adds the special tokens that the configuration files know to `backend`; returns the named ones."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    entries = dict(config)
    if "added_tokens_decoder" in config:
        for _, fields in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0])):
            if not isinstance(fields, dict):
                raise TypeError(f"added token {fields!r} is not an object")
            token = _added_token(fields)
            if repr(token) != repr(known.get(token.content)):
                backend.add_tokens([token])
            known[token.content] = token
    else:  # checkpoints of before transformers 4.34 keep them in a file of their own
        entries |= read_json(folder, "special_tokens_map.json") or {}
    extra = entries.get("extra_special_tokens") or entries.get("additional_special_tokens") or []
    if isinstance(extra, dict):  # named by the model, such as {"image_token": "<image>"}
        entries |= extra
        extra = []
    named = {}
    for name, value in entries.items():
        if (name in NAMED_TOKENS and value is not None) or (name.endswith("_token") and isinstance(value, (str, dict))):
            named[name] = _added_token(value)
    special = []
    for token in [*named.values(), *map(_added_token, extra)]:
        special.append(known.get(token.content, token))
    backend.add_special_tokens(special)
    return {name: token.content for name, token in named.items()}


def _added_token(fields: Any) -> tokenizers.AddedToken:
    if isinstance(fields, str):
        return tokenizers.AddedToken(fields, special=True, normalized=False)
    flags = {key: fields[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in fields}
    if not isinstance(fields["content"], str):
        raise TypeError(f"token content {fields['content']!r} is not text")
    return tokenizers.AddedToken(fields["content"], special=fields.get("special", True), **flags)
