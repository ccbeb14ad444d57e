"""What is asked in each task, and how an answer is scored."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from vlcache_jax.engine.requests import Request
from vlcache_jax.errors import InputError
from vlcache_jax.evaluation.metrics.anls import anls
from vlcache_jax.evaluation.metrics.contained import contained
from vlcache_jax.evaluation.metrics.exact_match import exact_match
from vlcache_jax.evaluation.metrics.option_letter import option_letter
from vlcache_jax.evaluation.metrics.relaxed_accuracy import relaxed_accuracy
from vlcache_jax.evaluation.metrics.vqa import vqa_accuracy
from vlcache_jax.evaluation.sample import LETTERS, Sample
from vlcache_jax.models.processor import Processor

_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
CIDER = "cider_d"
"""The one metric that needs all answers at once."""


def _best(score: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    return lambda answer, answers: max(score(answer, one) for one in answers)


METRICS: dict[str, Callable[[str, Sequence[str]], float] | None] = {
    "anls": anls,
    "exact_match": _best(exact_match),
    "relaxed_accuracy": _best(relaxed_accuracy),
    "vqa_accuracy": vqa_accuracy,
    "option_letter": option_letter,
    "contained": contained,
    CIDER: None,
}
"""From an answer and the right ones to a score."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task.

    Attributes:
      suffix: what follows a question.
      max_new_tokens: of an answer.
      metric: a name in `METRICS`.
      capitalise: whether questions begin with a capital, and go on without, as lmms-eval's do.
      replace: whether the suffix takes the question's place.
    """

    suffix: str = ""
    max_new_tokens: int = 64
    metric: str = "exact_match"
    capitalise: bool = False
    replace: bool = False

    def prompt(self, sample: Sample) -> str:
        """The user's message."""
        text = self.suffix if self.replace else sample.question
        if self.capitalise:
            text = text.capitalize()
        if sample.choices:
            text += "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, sample.choices))
        suffix = _LETTER if sample.choices and not self.suffix else self.suffix
        return text if self.replace else text + suffix

    def request(self, sample: Sample, processor: Processor) -> Request:
        """What is asked of the engine."""
        most = sample.max_new_tokens or self.max_new_tokens
        if sample.messages:
            return Request(id=sample.id, prompt=sample.messages, images=sample.images, max_new_tokens=most)
        text = self.prompt(sample)
        prompt: Any = "".join(processor.image_token + "\n" for _ in sample.images) + text
        if processor.has_chat_template:
            parts = [{"type": "image"} for _ in sample.images]
            prompt = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        return Request(id=sample.id, prompt=prompt, images=sample.images, max_new_tokens=most)

    def score(self, sample: Sample, answer: str) -> float | None:
        """None where there is no right answer to compare with, or all answers are needed."""
        name = "option_letter" if sample.choices and self.metric == "exact_match" else self.metric
        metric = METRICS[name]
        if metric is None or not sample.answers:
            return None
        if name == "option_letter":
            return option_letter(answer, sample.answers, sample.choices)
        return float(metric(answer, sample.answers))


TASKS = {
    "jsonl": Task(),
    "docvqa": Task(suffix=_SHORT, max_new_tokens=32, metric="anls"),
    "infovqa": Task(suffix=_SHORT, max_new_tokens=32, metric="anls"),
    "textvqa": Task(suffix=_SHORT, max_new_tokens=16, metric="vqa_accuracy", capitalise=True),
    "chartqa": Task(suffix=_SHORT, max_new_tokens=16, metric="relaxed_accuracy"),
    "coco_caption": Task(suffix="Provide a one-sentence caption for the provided image.", metric=CIDER, replace=True),
    "mmmu": Task(suffix=_LETTER, max_new_tokens=128, metric="option_letter"),
    "ocrbench": Task(max_new_tokens=128, metric="contained"),
}
"""By name; prompts and limits are those of lmms-eval."""


def task_by_name(name: str, **changes: Any) -> Task:
    """A task, with what the user wants otherwise; None changes nothing.

    Raises:
      InputError: an unknown task or metric.
    """
    if name not in TASKS:
        raise InputError(f"task {name!r} is not known: use one of {', '.join(TASKS)}")
    task = dataclasses.replace(TASKS[name], **{key: value for key, value in changes.items() if value is not None})
    if task.metric not in METRICS:
        raise InputError(f"metric {task.metric!r} is not known: use one of {', '.join(METRICS)}")
    return task
