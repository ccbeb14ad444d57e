"""Average normalised Levenshtein similarity, DocVQA's score."""

from collections.abc import Iterable

from vlcache_jax.evaluation.metrics.exact_match import normalised


def anls(prediction: str, answers: str | Iterable[str], threshold: float = 0.5, *, raw_lengths: bool = False) -> float:
    """Average normalised Levenshtein similarity of one prediction, DocVQA's score (arXiv 1907.00490).

    1 - distance / longer length, over the most similar of the accepted answers; 0 where that is below `threshold`.
    Case and the amount of white space do not count. With `raw_lengths` the longer length is that of the texts as they
    were given, as lmms-eval has it: white space that does not count as a difference then counts as length.

    Example:
      >>> anls("1324", ["1,324", "13"]), anls("abc", "xyz")
      (0.8, 0.0)
      >>> anls(" 1324   ", "1,324"), anls(" 1324   ", "1,324", raw_lengths=True)
      (0.8, 0.875)
    """
    accepted = [answers] if isinstance(answers, str) else list(answers)
    best = 0.0
    for answer in accepted:
        a, b = normalised(prediction), normalised(answer)
        longest = max(len(prediction), len(answer)) if raw_lengths else max(len(a), len(b))
        best = max(best, 1.0 - edit_distance(a, b) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions of one character."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
