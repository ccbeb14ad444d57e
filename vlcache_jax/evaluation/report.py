"""What an evaluation found, from the lines in its folder: means with intervals, and pairs of policies."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlcache_jax.errors import InputError
from vlcache_jax.evaluation.metrics.bleu import bleu
from vlcache_jax.evaluation.metrics.bootstrap import Interval, bootstrap_interval
from vlcache_jax.evaluation.metrics.cider import cider_d
from vlcache_jax.evaluation.metrics.exact_match import exact_match
from vlcache_jax.evaluation.metrics.rouge import rouge_l
from vlcache_jax.evaluation.run_folder import RunFolder
from vlcache_jax.evaluation.tasks import CIDER


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What one policy did. Nothing in it depends on how fast that was, or how often the program was stopped.

    Attributes:
      policy: as typed.
      metric: of the task.
      samples: that were answered.
      failed: of the samples, those without an answer.
      scored: of the samples, those whose right answer is known; a failed one scores 0.
      score: mean of those, with its 95 % interval; None without any.
      kept_fraction: mean over the answered ones.
      tokens: mean of an answer.
      compared: the policy it is compared with; None of that one, or without any.
      difference: mean of its scores minus the other's, sample by sample, with its 95 % interval.
      agreement: share of the samples that both answered in the same words.
      divergence: Kullback-Leibler divergence of its next token's distribution from the other's, along the other's
        answers, in nats a token: mean over the samples, with its 95 % interval; None where it was not measured.
      same_next: share of those tokens in whose place both find the same one likeliest, mean over the samples.
      also: other scores of captions, by name.
    """

    policy: str
    metric: str
    samples: int
    failed: int
    scored: int
    score: Interval | None
    kept_fraction: float | None
    tokens: float | None
    compared: str | None = None
    difference: Interval | None = None
    agreement: float | None = None
    divergence: Interval | None = None
    same_next: float | None = None
    also: Mapping[str, float] = dataclasses.field(default_factory=dict)


def summarise(folder: RunFolder, policies: Sequence[str] | None = None, compare: str | None = None) -> list[Summary]:
    """A summary for each policy.

    Args:
      folder: of the evaluation.
      policies: as typed; by default all that have answered something.
      compare: the one that the others are compared with.

    Raises:
      InputError: a policy that has answered nothing.
    """
    names, metric = list(policies or folder.policies()), folder.settings["metric"]
    lines = {name: folder.results(name) for name in dict.fromkeys([*names, *([compare] if compare else [])])}
    for name, found in lines.items():
        if not found:
            raise InputError(f"{folder.path} has no answers of {name!r}: it has those of {folder.policies()}")
    scores = {name: (_captions if metric == CIDER else _scores)(found) for name, found in lines.items()}
    summaries = []
    for name in names:
        found, own = lines[name], scores[name]
        answered = [line for line in found.values() if line["status"] == "ok"]
        summary = Summary(
            policy=name,
            metric=metric,
            samples=len(found),
            failed=len(found) - len(answered),
            scored=len(own),
            score=bootstrap_interval(np.array(_in_order(own))) if own else None,
            kept_fraction=_mean([line["kept_fraction"] for line in answered]),
            tokens=_mean([line["tokens"] for line in answered]),
            also=_also(found) if metric == CIDER and own else {},
        )
        if compare is not None and compare != name:
            other = scores[compare]
            both = {key: own[key] - other[key] for key in own if key in other}
            pairs = [(line, lines[compare][key]) for key, line in found.items() if key in lines[compare]]
            same = [exact_match(a["answer"], b["answer"]) for a, b in pairs if {a["status"], b["status"]} == {"ok"}]
            apart = folder.divergences(name, compare)
            kl = {key: line["kl"] for key, line in apart.items()}
            summary = dataclasses.replace(
                summary,
                compared=compare,
                difference=bootstrap_interval(np.array(_in_order(both))) if both else None,
                agreement=_mean(same),
                divergence=bootstrap_interval(np.array(_in_order(kl))) if kl else None,
                same_next=_mean([line["same_next"] for line in apart.values()]),
            )
        summaries.append(summary)
    return summaries


def _scores(lines: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {key: line["score"] or 0.0 for key, line in lines.items() if line["answers"]}


def _captions(lines: dict[str, dict[str, Any]]) -> dict[str, float]:
    keys, said, right = _said(lines)
    return dict(zip(keys, map(float, cider_d(said, right))))


def _also(lines: dict[str, dict[str, Any]]) -> dict[str, float]:
    _, said, right = _said(lines)
    return {"bleu_4": bleu(said, right), "rouge_l": float(np.mean([rouge_l(a, b) for a, b in zip(said, right)]))}


def _said(lines: dict[str, dict[str, Any]]) -> tuple[list[str], list[str], list[list[str]]]:
    """Ids of the samples with right answers, what was answered, and those."""
    keys = sorted(key for key, line in lines.items() if line["answers"])
    return keys, [lines[key]["answer"] for key in keys], [lines[key]["answers"] for key in keys]


def _in_order(scores: dict[str, float]) -> list[float]:
    """By their ids, so that a table does not depend on which sample finished first."""
    return [scores[key] for key in sorted(scores)]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(sorted(values))) if values else None


_COMPARED = ["policy", "kept", "score", "95 %", "difference", "95 %", "agreement"]
_APART = ["KL", "95 %", "same next token"]


def rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """The cells of a table: a header, and a row for each policy."""

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:.4f}"

    def bounds(interval: Interval | None) -> str:
        return "" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"

    also = sorted({name for summary in summaries for name in summary.also})
    apart = any(summary.divergence for summary in summaries)
    cells = [
        [
            summary.policy,
            number(summary.kept_fraction),
            number(summary.score and summary.score.mean),
            bounds(summary.score),
            number(summary.difference and summary.difference.mean),
            bounds(summary.difference),
            number(summary.agreement),
            *([number(summary.divergence and summary.divergence.mean), bounds(summary.divergence)] if apart else []),
            *([number(summary.same_next)] if apart else []),
            str(summary.samples),
            str(summary.failed),
            *(number(summary.also.get(name)) for name in also),
        ]
        for summary in summaries
    ]
    return [[*_COMPARED, *(_APART if apart else []), "samples", "failed", *also], *cells]
