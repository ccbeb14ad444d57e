"""Accuracy as in visual question answering, where ten people have answered."""

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_WORDS)}}


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with several people's answers to one question (arXiv 1505.00468).

    Each answer in turn is left out; against the others the prediction is worth min(1, matches / 3), and the result is
    the mean. A single answer is compared as it is.

    Both sides are normalised: lower case, number words as digits, no articles, no punctuation but in numbers. The
    official evaluation also mends contractions that lack their apostrophe; here apostrophes do not count at all.

    Example:
      >>> vqa_accuracy("The dog", ["dog"] * 3 + ["cat"] * 7)
      0.9
    """
    given, accepted = _normalised(prediction), [_normalised(answer) for answer in answers]
    if len(accepted) == 1:
        return float(given == accepted[0])
    matches = sum(given == answer for answer in accepted)
    others = [matches - (given == answer) for answer in accepted]
    return sum(min(1.0, count / 3) for count in others) / len(accepted)


def _normalised(text: str) -> str:
    text = text.lower().replace("'", "")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]|_", " ", text)
    return " ".join(_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)
