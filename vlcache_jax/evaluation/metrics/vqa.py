"""Accuracy as in visual question answering, where ten people have answered."""

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_WORDS)}}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_SHORTENED = """
    'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've how'd how'll isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll someone'd
    someone'd've someone'll something'd something'd've something'll there'd there'd've there're they'd they'd've they'll
    they're they've wasn't we'd've we've weren't what'll what're what've where'd where've who'd who'd've who'll who've
    why'll why're won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_MENDED = {
    word[: place.start()] + word[place.end() :]: word for word in _SHORTENED.split() for place in re.finditer("'", word)
}
"""Contractions that lack an apostrophe."""


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with several people's answers to one question (arXiv 1505.00468).

    Each answer in turn is left out; against the others the prediction is worth min(1, matches / 3), and the result is
    the mean. A single answer is compared as it is.

    Both sides are normalised as by EvalAI: lower case, number words as digits, no articles, no punctuation but in
    numbers, contractions with their apostrophe.

    Example:
      >>> vqa_accuracy("The dog", ["dog"] * 3 + ["cat"] * 7)
      0.9
    """
    given, accepted = _normalised(prediction), [_normalised(answer) for answer in answers]
    if len(accepted) == 1:
        return float(given == accepted[0])
    matches = sum(given == answer for answer in accepted)
    others = [matches - (given == answer) for answer in accepted]
    return sum(min(1.0, count / 3) for count in others) / len(accepted)


def _normalised(text: str) -> str:
    text = re.sub("[,?]", "", text.lower()).replace("'s", " 's")
    plain = text = re.sub(r"[\n\t]", " ", text).strip()
    for sign in _PUNCTUATION:  # beside a space it goes, between words it parts them
        text = text.replace(sign, "" if f"{sign} " in plain or f" {sign}" in plain else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)
