"""The tokenizers library in bounds: a checkpoint's tokenizer.json is data that others wrote."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files import limits

_PROBE = "Aa 1\n\u00e9\ue000"  # a letter, a digit, an accent and a character that no vocabulary has


@contextlib.contextmanager
def library_errors(make: Callable[[BaseException], Exception]) -> Iterator[None]:
    """Raises `make(error)` for whatever the library raises: bare Exceptions, and panics, which are none.

    A panic of Rust code is a BaseException whose class pyo3 does not export. Ctrl-C and exits pass.
    """
    try:
        yield
    except Exception as error:
        raise make(error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise make(error) from error


def read_backend(text: str, path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in the text of a tokenizer.json. `path` is how errors call it.

    Raises CheckpointError if it is none, fails on a few common characters, or would make texts a thousand times longer.
    """
    with library_errors(lambda error: CheckpointError(f"{path} is no valid tokenizer ({error}): download it again")):
        backend = tokenizers.Tokenizer.from_str(text)
        # A tokenizer.json may carry the padding and truncation of its last use; neither belongs to the model.
        backend.no_padding()
        backend.no_truncation()
    _check_steps(backend, path)
    with library_errors(
        lambda error: CheckpointError(
            f"{path} cannot tokenise a short text ({error}): correct it, or download it again"
        )
    ):
        backend.decode(backend.encode(_PROBE).ids)
    return backend


def _check_steps(backend: tokenizers.Tokenizer, path: Path) -> None:
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part = getattr(backend, name)
        growth, steps = 1, 0
        for step in _objects(None if part is None else json.loads(part.__getstate__())):
            steps += 1
            for key in ("content", "prepend", "replacement", "prefix", "suffix"):
                if isinstance(step.get(key), str):
                    growth *= max(1, len(step[key]))
        if growth > limits.TOKENIZER_GROWTH or steps > limits.TOKENIZER_STEPS:
            raise CheckpointError(
                f"{path}: the {name} has {steps} steps and can make a text {growth:.3g} times longer; the limits are "
                f"{limits.TOKENIZER_STEPS} and {limits.TOKENIZER_GROWTH}"
            )


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _objects(item)
