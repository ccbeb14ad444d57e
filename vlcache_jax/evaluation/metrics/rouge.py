"""ROUGE-L, a score of captions (Lin, 2004)."""

from collections.abc import Sequence

from vlcache_jax.evaluation.metrics.ptb import ptb_tokens

_BETA = 1.2  # how much more recall counts


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-score of the longest common subsequence of words, as captions are scored with it (beta = 1.2).

    (1 + beta^2) P R / (R + beta^2 P), with P and R the largest shares of the prediction's, and of a reference's, words
    that lie in the subsequence. Words are those of `ptb_tokens`.

    Example:
      >>> round(rouge_l("a red star", ["the red star", "a star"]), 4)
      0.8299
    """
    words = ptb_tokens(prediction)
    precision = recall = 0.0
    for other in map(ptb_tokens, references):
        common = _common(words, other)
        precision, recall = max(precision, common / max(1, len(words))), max(recall, common / max(1, len(other)))
    weight = _BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision) if precision and recall else 0.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
