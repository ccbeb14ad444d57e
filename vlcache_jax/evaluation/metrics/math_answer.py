"""MathVista's score, with rules where its authors ask a language model what an answer says."""

import ast
import re
from typing import Any, Literal

from vlcache_jax.evaluation.metrics.exact_match import normalised
from vlcache_jax.evaluation.metrics.numbers import number, numbers


def math_answer(
    prediction: str, answer: str, kind: Literal["integer", "float", "list", "text"], precision: int | None = None
) -> float:
    """1.0 if a prediction says the right number, list or text (MathVista, arXiv 2310.02255).

    A prediction that is a number or a list says that; of others what stands behind the last "answer is", "answer:" or
    "=", or else all of it: its last number, or its last list in brackets. A whole number is what comes before its
    point, and a float is rounded to so many decimals.

    Example:
      >>> math_answer("Then 2 + 12 = 14 apples.", "14", "integer"), math_answer("about 1.449", "1.45", "float", 2)
      (1.0, 1.0)
    """
    text = re.split(r"(?i:answer is|answer:)|=", prediction.strip().rstrip("."))[-1].strip() or prediction
    if kind == "list":
        return float(_list(text) == _list(answer) is not None)
    if kind == "text":
        return float(normalised(text) == normalised(answer))
    right, said = number(answer), number(text)
    found = numbers(text) if said is None else [said]
    if right is None or not found or abs(found[-1]) == float("inf") or found[-1] != found[-1]:
        return 0.0
    value = float(int(found[-1])) if kind == "integer" else round(found[-1], precision or 0)
    return float(abs(value - right) < 1e-9)


def _list(text: str) -> list[Any] | None:
    found = re.findall(r"\[[^\[\]]*\]", text)
    try:
        value = ast.literal_eval(found[-1]) if found else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None
