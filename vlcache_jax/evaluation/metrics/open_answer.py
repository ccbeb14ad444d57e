"""MMMU's score of questions without choices."""

from collections.abc import Sequence

from vlcache_jax.evaluation.metrics.numbers import number, numbers

_BEFORE = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def open_answer(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if a right answer is in what a prediction concludes (MMMU, arXiv 2311.16502).

    A line's conclusion is what stands behind the last of "is", "so", "answer", ..., and "=" in the last line; without
    any it is the prediction. Numbers must be the same to two decimals, words must be in it but for case.

    Example:
      >>> open_answer("The slope is 3.50.", ["3.5"]), open_answer("It is a Trapezoid", ["trapezoid"])
      (1.0, 1.0)
    """
    ends = _conclusions(prediction)
    found = {round(x, 2) for end in ends for x in [*numbers(end), number(end)] if x is not None}
    for answer in answers:
        value, words = number(answer.strip()), answer.strip().lower()
        if value is not None:
            if round(value, 2) in found:
                return 1.0
        elif any(word in end for end in map(_apart, ends) for word in {_apart(words).rstrip(), _apart(words).lstrip()}):
            return 1.0
    return 0.0


def _apart(text: str) -> str:
    """A single letter with spaces around it, which are to be beside it in a longer text."""
    return f" {text} " if len(text) == 1 else text


def _conclusions(text: str) -> list[str]:
    lines = text.strip().strip(".").lower().split("\n")
    found = []
    for i, line in enumerate(lines):
        marks = (*_BEFORE, *(("=",) if i == len(lines) - 1 else ()))
        ends = [line.rsplit(mark, 1)[1].strip() for mark in marks if mark in line]
        shortest = min(filter(None, ends), key=len, default="")
        if len(shortest) > 1 or shortest not in set(":,.!?;'"):
            found.append(shortest)
    return [end for end in found if end] or [text.strip().strip(".").lower()]
