"""What the demo prints: the answers with the full cache and with a compressed one, and what both cost."""

import dataclasses
import os
import textwrap
from typing import Any

import jax
import numpy as np

from vlcache_jax.demo.assets import Question
from vlcache_jax.evaluation.answering import Answers
from vlcache_jax.evaluation.metrics import exact_match
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.policies.budget import budget_value, policy_text
from vlcache_jax.policies.methods.method import title_of
from vlcache_jax.terminal.table import megabytes, percent, table
from vlcache_jax.typing import ModelSpec

_WIDTH = 79  # of an answer and its label
_FULL, _COMPRESSED = "full", "compressed"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A run of the demo.

    Attributes:
      questions: a row of the batch each.
      batch: the prompts.
      runs: the answers under "full" and "compressed".
      texts: the same as text.
      seconds: "inputs", "load" and "total".
    """

    questions: list[Question]
    batch: Batch
    runs: dict[str, Answers]
    texts: dict[str, list[str]]
    seconds: dict[str, float]

    @property
    def title(self) -> str:
        """Of the policy."""
        report = self.runs[_COMPRESSED].report
        return policy_text(title_of(report.policy), report.budget)

    def visual(self, row: int) -> int:
        """Visual tokens of a prompt."""
        return int(np.sum(np.asarray(self.batch.vision_index)[row] != TEXT))

    def right(self, name: str, row: int) -> bool | None:
        """Whether an answer is the expected one; None where nobody knows."""
        expected = self.questions[row].expected
        return None if expected is None else bool(exact_match(self.texts[name][row], expected))

    def page(self, spec: ModelSpec, dtype: str) -> str:
        """For people."""
        device, rows = jax.devices()[0], range(len(self.questions))
        many = f"{len(rows)} questions in one batch" if len(rows) > 1 else "1 question"
        compiling = sum(answers.seconds["compile"] for answers in self.runs.values())
        running = sum(a.seconds[name] for a in self.runs.values() for name in ("prefill", "decode"))
        blocks = [
            f"Demo: {many}, answered with the full KV cache and with {self.title}\n"
            f"({spec.num_layers} layers, {spec.num_kv_heads} KV heads, {dtype}, on {device.device_kind}, "
            f"{os.cpu_count()} cores)",
            *map(self._question, rows),
            self._kept_table(),
            self._cost_table(),
            f"Total {self.seconds['total']:.1f} s: reading inputs {self.seconds['inputs']:.1f}, loading weights "
            f"{self.seconds['load']:.1f}, compiling or reading\ncompiled programs {compiling:.1f}, running "
            f"{running:.1f}",
        ]
        return "\n\n".join(blocks)

    def _question(self, row: int) -> str:
        question = self.questions[row]
        images = f"{len(question.images)} image{'s' if len(question.images) != 1 else ''}"
        head = f"{row + 1}. {question.task} ({images}: {self.visual(row)} visual tokens of {self.batch.lengths[row]})"
        entries = [("question", question.question, None)]
        if question.expected is not None:
            entries.append(("expected", question.expected, None))
        for name, label in ((_FULL, "full cache"), (_COMPRESSED, self.title)):
            entries.append((label, self.texts[name][row], self.right(name, row)))
        width = max(16, *(len(label) for label, _, _ in entries)) + 1
        lines = [head]
        for label, text, right in entries:
            wrapped = textwrap.wrap(" ".join(text.split()) or "(nothing)", max(_WIDTH - width, 30))
            if len(wrapped) > 3:
                wrapped = [*wrapped[:2], wrapped[2] + " ..."]
            lines += [f"   {'' if i else label:<{width}}{line}" for i, line in enumerate(wrapped)]
            lines[-1] += {None: "", True: "  [right]", False: "  [wrong]"}[right]
        return "\n".join(lines)

    def _kept_table(self) -> str:
        report = self.runs[_COMPRESSED].report
        kept = np.asarray(report.kept)
        layers = kept.shape[1]
        # Of a deep model, evenly spaced layers: the line must not wrap.
        shown = range(layers) if layers <= 10 else [round(i * (layers - 1) / 9) for i in range(10)]
        rows = [["question", "prompt", *(f"L{layer}" for layer in shown), "kept"]]
        for row, question in enumerate(self.questions):
            name, length = f"{row + 1}. {question.task}"[:24], str(int(report.prompt_lengths[row]))
            share = percent(float(report.kept_fraction[row]))
            rows.append([name, length, *(str(kept[row, layer]) for layer in shown), share])
        return f"Prompt tokens kept per layer ({self.title}; the layers share one budget)\n{table(rows)}"

    def _cost_table(self) -> str:
        full, compressed = self.runs[_FULL], self.runs[_COMPRESSED]
        rows = [["", "full cache", self.title, "ratio"]]
        known = [row for row, question in enumerate(self.questions) if question.expected is not None]
        if known:
            right = [sum(bool(self.right(name, row)) for row in known) for name in self.runs]
            rows.append(["right answers", *(f"{count} of {len(known)}" for count in right)])
        for label, field in (
            ("KV cache of the prompts", "state_bytes"),
            ("room for the answers", "tail_bytes"),
            ("held together", "held_bytes"),
        ):
            a, b = getattr(full.report, field), getattr(compressed.report, field)
            rows.append([label, megabytes(a), megabytes(b), percent(b / a)])
        for name, label in (("prefill", "prefill, seconds"), ("decode", "decoding, seconds")):
            x, y = full.seconds[name], compressed.seconds[name]
            rows.append([label, f"{x:.3f}", f"{y:.3f}", percent(y / x)])
        rows.append(["compiling apart, seconds", *(f"{a.seconds['compile']:.2f}" for a in (full, compressed))])
        return "Cost of the whole batch\n" + table(rows)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        report = self.runs[_COMPRESSED].report
        return {
            "questions": [
                {
                    "task": question.task,
                    "question": question.question,
                    "expected": question.expected,
                    "answers": {name: self.texts[name][row] for name in self.runs},
                    "right": None if question.expected is None else {name: self.right(name, row) for name in self.runs},
                    "prompt_tokens": int(self.batch.lengths[row]),
                    "visual_tokens": self.visual(row),
                    "kept": np.asarray(report.kept)[row].tolist(),
                    "kept_fraction": float(report.kept_fraction[row]),
                }
                for row, question in enumerate(self.questions)
            ],
            "policy": report.policy,
            "budget": budget_value(report.budget),
            "full_bytes": report.full_bytes,
            "runs": {name: answers.costs() for name, answers in self.runs.items()},
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }
