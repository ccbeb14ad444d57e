"""What is asked in each task, and how an answer is scored."""

import dataclasses
from collections.abc import Callable
from typing import Any

from vlcache_jax.engine.requests import Request
from vlcache_jax.errors import InputError
from vlcache_jax.evaluation import mathvista
from vlcache_jax.evaluation.metrics.anls import anls
from vlcache_jax.evaluation.metrics.contained import contained
from vlcache_jax.evaluation.metrics.exact_match import exact_match
from vlcache_jax.evaluation.metrics.open_answer import open_answer
from vlcache_jax.evaluation.metrics.option_letter import option_letter
from vlcache_jax.evaluation.metrics.relaxed_accuracy import relaxed_accuracy
from vlcache_jax.evaluation.metrics.rouge import rouge_l
from vlcache_jax.evaluation.metrics.vqa import vqa_accuracy
from vlcache_jax.evaluation.sample import LETTERS, Sample
from vlcache_jax.models.processor import Processor

_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
CIDER = "cider_d"
"""The one metric that needs all answers at once."""

_Metric = Callable[[str, Sample], float]


def _best(score: Callable[[str, str], float]) -> _Metric:
    return lambda answer, sample: max(score(answer, one) for one in sample.answers)


def _letter(answer: str, sample: Sample) -> float:
    return option_letter(answer, sample.answers, sample.choices)


def _letter_or(score: _Metric) -> _Metric:
    return lambda answer, sample: _letter(answer, sample) if sample.choices else score(answer, sample)


METRICS: dict[str, _Metric | None] = {
    "anls": lambda answer, sample: anls(answer, sample.answers),
    "anls_lmms": lambda answer, sample: anls(answer, sample.answers, raw_lengths=True),
    "exact_match": _letter_or(_best(exact_match)),
    "relaxed_accuracy": _best(relaxed_accuracy),
    "vqa_accuracy": lambda answer, sample: vqa_accuracy(answer, sample.answers),
    "option_letter": _letter,
    "mmmu": _letter_or(lambda answer, sample: open_answer(answer, sample.answers)),
    "mathvista_rule": mathvista.score,
    "contained": lambda answer, sample: contained(
        answer, sample.answers, formula=sample.more.get("dataset") == "HME100k"
    ),
    "rouge_l": lambda answer, sample: rouge_l(answer, sample.answers),
    CIDER: None,
}
"""From an answer and its sample, which has right ones, to a score."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task.

    Attributes:
      suffix: what follows a question.
      choice_suffix: what follows one with choices, and its choices, if it is not the suffix; without both, a letter
        is asked for.
      max_new_tokens: of an answer.
      metric: a name in `METRICS`.
      capitalise: whether questions begin with a capital, and go on without, as lmms-eval's do.
      replace: whether the suffix takes the question's place.
      hints: whether what follows is said for each kind of question, as MathVista does, unless there is a suffix.
    """

    suffix: str = ""
    choice_suffix: str = ""
    max_new_tokens: int = 64
    metric: str = "exact_match"
    capitalise: bool = False
    replace: bool = False
    hints: bool = False

    def prompt(self, sample: Sample) -> str:
        """The user's message."""
        if self.replace:
            return self.suffix
        text = sample.question.capitalize() if self.capitalise else sample.question
        if self.hints:
            text += mathvista.unit(sample)
        if sample.choices:
            text += "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, sample.choices))
        suffix = self.choice_suffix or self.suffix if sample.choices else self.suffix
        if not suffix and self.hints:
            suffix = mathvista.hint(sample)
        return text + (suffix or _LETTER if sample.choices else suffix)

    def request(self, sample: Sample, processor: Processor) -> Request:
        """What is asked of the engine. Raises InputError for a video without a chat template, which places it."""
        most = sample.max_new_tokens or self.max_new_tokens
        if sample.messages:
            return Request(id=sample.id, prompt=sample.messages, images=sample.images, max_new_tokens=most)
        text = self.prompt(sample)
        prompt: Any = "".join(processor.image_token + "\n" for _ in sample.images) + text
        if processor.has_chat_template:
            parts = [{"type": "image"} for _ in sample.images]
            parts += [{"type": "video", "video": path} for path in sample.videos]
            prompt = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        elif sample.videos:
            raise InputError(f"the sample {sample.id!r} has videos, but the checkpoint no chat template: add one")
        return Request(id=sample.id, prompt=prompt, images=sample.images, max_new_tokens=most)

    def score(self, sample: Sample, answer: str) -> float | None:
        """None where there is no right answer to compare with, or all answers are needed."""
        metric = METRICS[self.metric]
        return None if metric is None or not sample.answers else metric(answer, sample)


TASKS = {
    "jsonl": Task(),
    "docvqa": Task(suffix=_SHORT, max_new_tokens=32, metric="anls"),
    "infovqa": Task(suffix=_SHORT, max_new_tokens=32, metric="anls"),
    "textvqa": Task(suffix=_SHORT, max_new_tokens=16, metric="vqa_accuracy", capitalise=True),
    "chartqa": Task(suffix=_SHORT, max_new_tokens=16, metric="relaxed_accuracy"),
    "coco_caption": Task(suffix="Provide a one-sentence caption for the provided image.", metric=CIDER, replace=True),
    "mmmu": Task(suffix="\n" + _SHORT, choice_suffix="\n" + _LETTER, max_new_tokens=128, metric="mmmu"),
    "mathvista": Task(max_new_tokens=1024, metric="mathvista_rule", hints=True),
    "ocrbench": Task(max_new_tokens=128, metric="contained"),
}
"""By name; prompts and limits are those of lmms-eval, but for MathVista's limit of 16,384 tokens."""


def task_by_name(name: str, **changes: Any) -> Task:
    """A task, with what the user wants otherwise; None changes nothing.

    Raises:
      InputError: an unknown task or metric.
    """
    if name not in TASKS:
        raise InputError(f"task {name!r} is not known: use one of {', '.join(TASKS)}")
    changes = {key: value for key, value in changes.items() if value is not None}
    if "suffix" in changes:  # then it follows all questions
        changes["choice_suffix"] = changes["suffix"]
    task = dataclasses.replace(TASKS[name], **changes)
    if task.metric not in METRICS:
        raise InputError(f"metric {task.metric!r} is not known: use one of {', '.join(METRICS)}")
    return task
