"""Whether an answer is right, word for word."""


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both are the same but for case and white space, else 0.0."""
    return float(normalised(prediction) == normalised(answer))


def normalised(text: str) -> str:
    """Lower case, words separated by single spaces."""
    return " ".join(text.lower().split())
