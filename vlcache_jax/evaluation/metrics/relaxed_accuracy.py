"""ChartQA's score."""

from vlcache_jax.evaluation.metrics.exact_match import normalised


def relaxed_accuracy(prediction: str, answer: str, tolerance: float = 0.05) -> float:
    """1.0 for a number within 5 % of the right one, or for the same words (ChartQA, arXiv 2203.10244).

    A per cent sign divides by 100. If one side is no number, or the right one is 0, the words must be the same but for
    case and white space.

    Example:
      >>> relaxed_accuracy("14.4", "15"), relaxed_accuracy("14%", "0.15"), relaxed_accuracy("Yes", "yes")
      (1.0, 0.0, 1.0)
    """
    given, right = _number(prediction), _number(answer)
    if given is not None and right:
        return float(abs(given - right) / abs(right) <= tolerance)
    return float(normalised(prediction) == normalised(answer))


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
