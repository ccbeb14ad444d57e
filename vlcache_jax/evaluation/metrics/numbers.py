"""Numbers in texts."""

import re

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\.\d+|\d+)(?:[eE][+-]?\d+)?(?![\d,]*\d)")


def number(text: str) -> float | None:
    """The number that a text is, with commas between thousands or without; None if it is none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def numbers(text: str) -> list[float]:
    """The numbers in a text, in its order.

    Example:
      >>> numbers("from 1,234.5 to -3, or 2e3")
      [1234.5, -3.0, 2000.0]
    """
    return [float(found.replace(",", "")) for found in _NUMBER.findall(text)]
