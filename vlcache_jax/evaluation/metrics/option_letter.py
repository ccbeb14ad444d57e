"""Multiple choice: which letter an answer names."""

import re
from collections.abc import Sequence

from vlcache_jax.evaluation.metrics.exact_match import normalised

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def option_letter(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1.0 if a prediction names the right option.

    The first of these that is there counts: a letter alone; "B." or "B:" at the beginning; "answer is B"; the last
    letter in brackets; the last capital letter that stands alone; the words of one choice. A right answer is a letter,
    or the words of a choice. Nothing is guessed where there is none of these.

    Example:
      >>> option_letter("(B) a dog", ["B"]), option_letter("I think the answer is C.", ["B"])
      (1.0, 0.0)
      >>> option_letter("a dog", ["B"], ["a cat", "a dog"])
      1.0
    """
    right = {_letter_of(answer, choices) for answer in answers}
    return float(named_letter(prediction, choices) in right)


def _letter_of(answer: str, choices: Sequence[str]) -> str:
    words = [normalised(choice) for choice in choices]
    if normalised(answer) in words:
        return _LETTERS[words.index(normalised(answer))]
    return answer.strip().strip("().").upper()


def named_letter(text: str, choices: Sequence[str] = ()) -> str | None:
    """The letter that a text names; see `option_letter`."""
    text = text.strip()
    for pattern in (
        r"^\(?([A-Za-z])\)?[.:)]?$",
        r"^([A-Z])[).:]",
        r"(?i:answer(?: is|:))\s*\(?([A-Z])\b",
        r"\(([A-Z])\)",
        r"\b([B-Z])\b|(?<![\w'])(A)(?![\w'])(?!\s+[a-z])",
    ):
        found = list(re.finditer(pattern, text))
        if found:
            return next(letter for letter in found[-1].groups() if letter).upper()
    words = [normalised(choice) for choice in choices]
    inside = [i for i, choice in enumerate(words) if choice and choice in normalised(text)]
    return _LETTERS[inside[0]] if len(inside) == 1 else None
