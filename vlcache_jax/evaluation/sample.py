"""One question of a data set."""

import dataclasses
from collections.abc import Mapping
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST = 200
"""Characters of another column's value that is copied to the result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One question.

    Attributes:
      id: its name, unlike all others of the data.
      images: paths or data URLs.
      videos: paths of files.
      question: what the user asks.
      messages: a conversation instead; then `question` is empty.
      answers: the right ones; empty where they are not known.
      choices: what there is to choose from; an answer is then a letter.
      max_new_tokens: of its answer; None for the task's.
      more: whatever else its file says of it.
    """

    id: str
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    question: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
