"""OCRBench's score."""

from collections.abc import Sequence

_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", ord("\n"): " "}
_NO_SPACE = {ord(" "): "", ord("\n"): ""}


def contained(prediction: str, answers: Sequence[str], *, formula: bool = False) -> float:
    """1.0 if one of the right answers is in the prediction (OCRBench, arXiv 2305.07895).

    Case does not count, nor whether letters are of full width. Of a formula case does, and spaces do not.

    Example:
      >>> contained("The sign says STOP.", ["stop"]), contained("go", ["stop"])
      (1.0, 0.0)
      >>> contained("x ^ 2 + Y", ["x^2"], formula=True)
      1.0
    """

    def plain(text: str) -> str:
        return text.translate(_NO_SPACE) if formula else text.translate(_NARROW).lower().strip()

    return float(any(plain(answer) in plain(prediction) for answer in answers))
