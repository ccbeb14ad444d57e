"""A checkpoint's `tokenizer.json`, run as transformers' fast tokenizers run it."""

import functools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.models.io.files import CheckpointFolder, optional_json, optional_text
from vlcache_jax.models.text.text_stream import TextStream
from vlcache_jax.models.text.tokenizer_library import library_errors, read_backend

NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Special tokens that every tokenizer may have."""
_FLAGS = ("add_bos_token", "add_eos_token")  # whether to add a token, not which


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      special_tokens: the named special tokens, such as {"bos_token": "<s>", "image_token": "<image>"}.
      end_ids: ids that end an answer: those of the model's configuration, and the end-of-sequence token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        end_ids: Iterable[int] = (),
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        eos = self.eos_token_id
        self.end_ids = frozenset(end_ids) | frozenset(() if eos is None else (eos,))

    def __getstate__(self) -> dict[str, Any]:
        # What a tokenizer.json has no place for.
        return self.__dict__ | {"encode_special_tokens": self.backend.encode_special_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        flag = state.pop("encode_special_tokens")
        self.__dict__.update(state)
        self.backend.encode_special_tokens = flag

    @classmethod
    def from_folder(cls, folder: Path | CheckpointFolder, end_ids: Iterable[int] = ()) -> "Tokenizer":
        """Reads `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

        Special tokens that only the latter two know are added, and a beginning-of-sequence token is prepended
        if the post-processor of `tokenizer.json` says so (`add_bos_token` does not count): as `AutoTokenizer`
        of transformers 5 does for LLaVA checkpoints.

        Raises CheckpointError if `tokenizer.json` is missing or one of the files is malformed.
        """
        text = optional_text(folder, "tokenizer.json")
        if text is None:
            raise CheckpointError(
                f"{folder} has no tokenizer.json: write one with transformers, by "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}), which "
                "converts a tokenizer.model or vocab.json to a fast tokenizer"
            )
        backend = read_backend(text, folder / "tokenizer.json")
        config = optional_json(folder, "tokenizer_config.json") or {}

        def malformed(error: BaseException) -> Exception:
            if isinstance(error, CheckpointError):
                return error
            return CheckpointError(
                f"{folder / 'tokenizer_config.json'} has malformed special tokens ({error}): download it again"
            )

        with library_errors(malformed):
            special_tokens = _add_tokens(backend, config, folder)
            split = config.get("split_special_tokens", False)
            if split is not None and not isinstance(split, bool):
                raise TypeError(f"split_special_tokens = {split!r} is not true or false")
            backend.encode_special_tokens = bool(split)
        return cls(backend, special_tokens, end_ids)

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
        with library_errors(lambda error: self._error(error, f"the text {text[:80]!r} cannot be tokenised")):
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids beyond the vocabulary (rows that pad an embedding) give nothing."""
        ids = [int(token_id) for token_id in token_ids]
        if ids and not 0 <= min(ids) <= max(ids) < 2**32:
            raise InputError(f"token ids from {min(ids)} to {max(ids)} cannot be decoded: they must be at least 0")
        with library_errors(lambda error: self._error(error, f"the token ids {ids[:20]!s} cannot be decoded")):
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_stream(
        self, skip_special_tokens: bool = True, eos_token_ids: Collection[int] | None = None
    ) -> TextStream:
        """A decoder that takes the tokens of one row one at a time.

        `eos_token_ids` end an answer, as in `generate`: those of the checkpoint by default, none if it is empty.
        """
        ends = self.end_ids if eos_token_ids is None else eos_token_ids
        return TextStream(functools.partial(self.decode, skip_special_tokens=skip_special_tokens), ends)

    @staticmethod
    def _error(error: BaseException, what: str) -> Exception:
        if isinstance(error, (TypeError, UnicodeError)):
            return InputError(f"{what} ({error}): give a str of valid Unicode")
        return CheckpointError(
            f"{what} by this checkpoint's tokenizer.json ({error}): correct it, or download it again"
        )


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path | CheckpointFolder
) -> dict[str, str]:
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
        of_map = optional_json(folder, "special_tokens_map.json") or {}
        entries |= {key: _typed(value) for key, value in of_map.items()}
    extra = entries.get("extra_special_tokens") or entries.get("additional_special_tokens") or []
    if isinstance(extra, dict):  # named by the model, such as {"image_token": "<image>"}
        entries |= {key: _typed(value) for key, value in extra.items()}
        extra = []
    named = {}
    for name, value in entries.items():
        # As in transformers, a model's own entries count as tokens if they are texts, or objects that say so.
        is_token = isinstance(value, str) or (isinstance(value, dict) and value.get("__type") == "AddedToken")
        of_model = name.endswith("_token") and name not in _FLAGS and is_token
        if (name in NAMED_TOKENS and value is not None) or of_model:
            named[name] = _added_token(value)
    special = []
    for token in [*named.values(), *map(_added_token, extra)]:
        special.append(known.get(token.content, token))
    backend.add_special_tokens(special)
    return {name: token.content for name, token in named.items()}


def _typed(value: Any) -> Any:
    return value | {"__type": "AddedToken"} if isinstance(value, dict) else value


def _added_token(fields: Any) -> tokenizers.AddedToken:
    if isinstance(fields, str):
        return tokenizers.AddedToken(fields, special=True, normalized=False)
    flags = {key: fields[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in fields}
    if not isinstance(fields["content"], str):
        raise TypeError(f"token content {fields['content']!r} is not text")
    return tokenizers.AddedToken(fields["content"], special=fields.get("special", True), **flags)
