"""CIDEr-D, the score of captions (Vedantam, Zitnick, Parikh: arXiv 1411.5726)."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from vlcache_jax.evaluation.metrics.ptb import ptb_tokens

_LONGEST = 4  # n-grams of 1 to 4 words
_SIGMA = 6.0  # words

_Counts = list[Counter[tuple[str, ...]]]


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each caption, in [0, 10].

    For n-grams w of length n, with counts c(w) in the caption and r(w) in a reference, and idf(w) = log(images) -
    log(images whose references hold w, at least 1):

        g(w) = c(w) idf(w);   q(w) = r(w) idf(w)
        s_n  = sum over w of min(g(w), q(w)) q(w) / (|g| |q|) * exp(-(difference in words)^2 / (2 * 6^2))

    averaged over n = 1 to 4 and over the references, times 10. Words are those of `ptb_tokens`. Document frequencies
    come from the references given here, so that the scores of one image alone are 0. As in the authors' later code,
    nothing is stemmed.

    Args:
      predictions: one caption for each image.
      references: the captions of people for each image, one or more.

    Returns:
      f64 [images]; the corpus score is its mean.

    Raises:
      ValueError: numbers of images that differ, or an image without references.
    """
    if len(predictions) != len(references) or not all(references):
        raise ValueError(f"{len(predictions)} captions need as many lists of references, none of them empty")
    counted = [[_count(text) for text in texts] for texts in references]
    holding: Counter[tuple[str, ...]] = Counter()
    for texts in counted:
        holding.update({gram for counts in texts for of_length in counts for gram in of_length})
    images = math.log(len(references)) if references else 0.0

    def weigh(counts: _Counts) -> list[dict[tuple[str, ...], float]]:
        return [{w: c * (images - math.log(max(1, holding[w]))) for w, c in some.items()} for some in counts]

    scores = []
    for prediction, texts in zip(predictions, counted, strict=True):
        candidate = _count(prediction)
        weights = weigh(candidate)
        similar = [
            _similarity(weights, weigh(text)) * math.exp(-((_words(candidate) - _words(text)) ** 2) / (2 * _SIGMA**2))
            for text in texts
        ]
        scores.append(10 * sum(similar) / len(similar))
    return np.asarray(scores)


def _count(text: str) -> _Counts:
    words = ptb_tokens(text)
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, _LONGEST + 1)]


def _words(counts: _Counts) -> int:
    return sum(counts[0].values())


def _similarity(g: list[dict[tuple[str, ...], float]], q: list[dict[tuple[str, ...], float]]) -> float:
    total = 0.0
    for a, b in zip(g, q, strict=True):
        size = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
        if size:
            total += sum(min(x, b[w]) * b[w] for w, x in a.items() if w in b) / size
    return total / _LONGEST
