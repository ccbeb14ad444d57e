"""From what was typed to policies, sampling and files; everything wrong is refused before any work."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from vlcache_jax.cli import words
from vlcache_jax.errors import InputError, PolicyError
from vlcache_jax.files.writing import check_target, make_folder
from vlcache_jax.inference.sampling import Sampling
from vlcache_jax.policies import POLICIES, LastRows, Policy, PostVision, policy_by_name
from vlcache_jax.policies.budget import Budget, Bytes, Mass, Tokens
from vlcache_jax.policies.rows.spans import AllRows, Rows

_DEFAULT_BUDGET = 0.1
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf"}


def as_budget(word: words.BudgetWord) -> Budget:
    """The budget that a word means.

    Raises PolicyError for a mass or cap out of range, or no cap.

    Example:
      >>> as_budget(("tokens", (256,))), as_budget(("mass", (0.98, 0.4)))
      (Tokens(count=256), Mass(share=0.98, cap=0.4))
    """
    kind, values = word
    return {"fraction": float, "tokens": Tokens, "bytes": Bytes, "mass": Mass}[kind](*values)


def build_policy(name: str, budget: words.BudgetWord | None, options: list[str]) -> Policy:
    """The policy called `name`, with `options` of the form "name=value".

    Raises PolicyError for a malformed option or whatever `policy_by_name` refuses.
    """
    values: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise PolicyError(f"policy option {option!r} is not of the form name=value, such as heads=shared")
        if key in values or (key == "budget" and budget is not None):
            raise PolicyError(f"policy option {key!r} is given twice: give it once")
        values[key] = _rows(text) if key == "rows" else _value(key, text)
    if budget is not None:
        values["budget"] = as_budget(budget)
    elif name in POLICIES and name not in ("full_cache", "zip_vl"):  # all; a cap on what the prompt decides
        values.setdefault("budget", _DEFAULT_BUDGET)
    try:
        return policy_by_name(name, **values)
    except TypeError as error:  # a word where a number belongs
        given = ", ".join(f"{key}={value!r}" for key, value in values.items())
        raise PolicyError(
            f"policy {name!r} cannot be built with {given} ({error}): check the options' types"
        ) from error


_CONSTANTS = {"true": True, "false": False, "none": None}


def _value(key: str, text: str) -> Any:
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    for kind in (words.whole(-words.LARGEST), words.number):
        try:
            value = kind(text)
        except argparse.ArgumentTypeError as error:
            if "out of range" in str(error):
                raise PolicyError(f"policy option {key}: {error}") from None
            continue
        return value
    return text


def _rows(text: str) -> Rows:
    kind, _, count = text.partition(":")
    if text in ("post_vision", "all"):
        return PostVision() if text == "post_vision" else AllRows()
    if kind == "last":
        try:
            return LastRows(words.whole(1)(count))
        except argparse.ArgumentTypeError as error:
            raise PolicyError(f"rows={words.shown(text)}: {error}") from None
    raise PolicyError(f"rows={words.shown(text)} is not known: use post_vision, last:COUNT (such as last:50) or all")


def build_sampling(temperature: float | None, top_k: int | None, top_p: float | None) -> Sampling | None:
    """Greedy (None) unless one of the three is given. Raises InputError for a value out of range."""
    if temperature is None and top_k is None and top_p is None:
        return None
    return Sampling(temperature=1.0 if temperature is None else temperature, top_k=top_k, top_p=top_p)


def check_picture_path(text: str | None) -> Path | None:
    """The path of a picture to write, or None where none is asked for.

    Raises InputError if it is no kind of picture, or cannot be written there.
    """
    if text is None:
        return None
    path = Path(text)
    if path.suffix.lower() not in _PICTURES:
        raise InputError(
            f"--explain {text!r}: {path.suffix or 'no ending'!r} is no known image format: use .png, .jpg or .webp"
        )
    check_target(path)
    check_writable(path.parent, f"--explain {text!r}")
    return path


def output_folder(text: str, option: str) -> Path:
    """The folder to write into, which is made where it is missing.

    Raises InputError if that is not possible, or nothing can be written there.
    """
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option} {text!r} is a file: give a folder")
    make_folder(folder)
    check_writable(folder, f"{option} {text!r}")
    return folder


def check_writable(folder: Path, what: str) -> None:
    """Raises InputError, which begins with `what`, if no file can be written in a folder: found before a long run."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{what} cannot be written there ({error.strerror}): choose another path") from error
