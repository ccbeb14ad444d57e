"""OCRBench's score."""

from collections.abc import Sequence

from vlcache_jax.evaluation.metrics.exact_match import normalised


def contained(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if one of the right answers is in the prediction, whatever its case and white space (arXiv 2305.07895).

    Example:
      >>> contained("The sign says  STOP.", ["stop"]), contained("go", ["stop"])
      (1.0, 0.0)
    """
    text = normalised(prediction)
    return float(any(normalised(answer) in text for answer in answers))
