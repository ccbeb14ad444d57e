"""BLEU, a score of translations and captions (Papineni et al., 2002)."""

import math
from collections import Counter
from collections.abc import Sequence

from vlcache_jax.evaluation.metrics.ptb import ptb_tokens


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], longest: int = 4) -> float:
    """BLEU of all captions together, without smoothing.

    The geometric mean, over n-grams of 1 to `longest` words, of the share of the captions' n-grams that are in a
    reference, each at most as often as in one of them; times exp(1 - r / c) where the captions' c words are fewer than
    the r words of the references that are closest in length. Words are those of `ptb_tokens`.

    Example:
      >>> bleu(["a red star on a wall"], [["a red star on the wall"]])
      0.537284965911771
    """
    right, all_ = [0] * longest, [0] * longest
    said = expected = 0
    for prediction, texts in zip(predictions, references, strict=True):
        words, others = ptb_tokens(prediction), [ptb_tokens(text) for text in texts]
        said += len(words)
        expected += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for n in range(1, longest + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for other in others:
                most |= _grams(other, n)
            right[n - 1] += (_grams(words, n) & most).total()
            all_[n - 1] += max(0, len(words) - n + 1)
    if not all(right):
        return 0.0
    precision = math.exp(sum(math.log(x / y) for x, y in zip(right, all_, strict=True)) / longest)
    return precision * math.exp(min(0.0, 1 - expected / said))


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
