"""The results as tables: means, and paired intervals of the difference to the full cache."""

from collections.abc import Callable, Sequence

import numpy as np

from vlcache_jax.demo.study.methods import FULL, Method, all_methods
from vlcache_jax.demo.study.results import Key, Result, ResultFile
from vlcache_jax.demo.study.run import KNOWN
from vlcache_jax.demo.study.tasks import score_name
from vlcache_jax.evaluation.metrics import bootstrap_interval

_TITLES = {
    "documents": "Documents",
    "document_pairs": "Two pages",
    "prices": "Prices",
    "scenes": "Scenes",
    "counts": "Counts",
    "places": "Places",
}


class Table:
    """A study's results of one mode, with means over samples.

    Attributes:
      tasks, methods, budgets: what there are results of. The full cache counts as every method's budget of 1.
      samples: of each task.
    """

    def __init__(self, file: ResultFile, mode: str = KNOWN) -> None:
        self._results = file.results
        self._mode = mode
        self.tasks = [task for task in dict.fromkeys(key.task for key in file.results) if self.full(task) is not None]
        there = {key.method for key in file.results if key.mode == mode and key.task in self.tasks}
        order = [method.name for method in all_methods()]
        self.methods = [name for name in order if name in there] + sorted(there - {FULL, *order})
        self.budgets = sorted({key.budget for key in file.results if key.task in self.tasks})
        self.samples = len(next(iter(file.results.values())).exact) if file.results else 0

    def full(self, task: str) -> Result | None:
        """The full cache's result."""
        return self._results.get(Key(task, FULL, 1.0, KNOWN))

    def result(self, task: str, method: str, budget: float) -> Result | None:
        """What was measured, if it was."""
        return self.full(task) if budget == 1 else self._results.get(Key(task, method, budget, self._mode))

    def title(self, task: str, short: bool = False) -> str:
        """What a task is called, with the name of its score unless `short`."""
        title = _TITLES.get(task, task.replace("_", " ").capitalize())
        return title if short else f"{title} ({score_name(task)})"

    def value(self, task: str | None, method: str, budget: float) -> float | None:
        """Mean score; of all tasks, None, the mean of what `relative` gives."""
        if task is None:
            return self.relative(None, method, budget)
        result = self.result(task, method, budget)
        return None if result is None else float(result.score.mean())

    def relative(self, task: str | None, method: str, budget: float) -> float | None:
        """Mean score as a share of the full cache's; None for a task means all of them, and all must be there."""
        if task is None:
            values = [self.relative(name, method, budget) for name in self.tasks]
            known = [value for value in values if value is not None]
            return sum(known) / len(known) if known and len(known) == len(values) else None
        value, full = self.value(task, method, budget), self.full(task)
        return None if value is None or full is None else value / max(float(full.score.mean()), 1e-9)

    def density(self, task: str, budget: float) -> np.ndarray | None:
        """Of each layer, as VL-Cache measures it."""
        result = self.result(task, "vl_cache", budget)
        return None if result is None else result.density

    def by_rank(self) -> list[str]:
        """Methods by their mean relative score over all tasks and budgets, the best first."""

        def mean(method: str) -> float:
            values = [self.relative(task, method, b) for task in self.tasks for b in self.budgets if b < 1]
            known = [value for value in values if value is not None]
            return sum(known) / len(known) if known else -1.0

        return sorted(self.methods, key=lambda name: -mean(name))


def tables(table: Table) -> str:
    """All tables as Markdown."""
    budgets = [budget for budget in table.budgets if budget < 1]
    heads = ["method", *(f"{100 * budget:g} %" for budget in budgets)]

    def of_methods(cell: Callable[[str, float], str]) -> str:
        rows = ([Method(m).label, *(cell(m, b) for b in budgets)] for m in table.by_rank())
        lines = [heads, ["---", *["---:"] * len(budgets)], *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def relative(method: str, budget: float) -> str:
        value = table.relative(None, method, budget)
        return "" if value is None else f"{100 * value:.1f}"

    blocks = [
        f"{table.samples} held-out samples a task. Methods by their mean over tasks and budgets.",
        "## Mean of all tasks, in per cent of the full cache's score",
        of_methods(relative),
    ]
    for task in table.tasks:
        full = table.full(task)
        assert full is not None
        scale, unit = (1, "") if score_name(task) == "CIDEr" else (100, " %")
        blocks += [
            f"## {table.title(task)}",
            f"Full cache: {score_name(task)} {scale * full.score.mean():.4g}{unit}, exact match "
            f"{100 * full.exact.mean():.1f} %. Score, and below it the 95 % interval of its difference to the full "
            "cache on the same samples; **bold** where that interval holds 0.",
            of_methods(lambda m, b: _difference(table.result(task, m, b), full, scale)),  # noqa: B023
            f"### {table.title(task, short=True)}: exact match, and answers equal to the full cache's, in %",
            of_methods(lambda m, b: _means([table.result(task, m, b)], ("exact", "agrees"))),  # noqa: B023
        ]

    def results(method: str, budget: float) -> list[Result | None]:
        return [table.result(task, method, budget) for task in table.tasks]

    blocks += [
        "## Attention of the answer that is kept, and hits among the tokens it attends to most, in %",
        "Means over tasks. See [the measures](../command_line.md#study).",
        of_methods(lambda m, b: _means(results(m, b), ("mass", "hits"))),
        "## Kept fraction of the prompt's cache, and bytes of the buffers, in % of the full cache's",
        "Means over tasks. Buffers have room for the padded prompts, and segments are aligned.",
        of_methods(lambda m, b: _cost(results(m, b))),
    ]
    return "\n\n".join(blocks) + "\n"


def _difference(result: Result | None, full: Result, scale: float) -> str:
    if result is None:
        return ""
    _, low, high = bootstrap_interval(scale * (result.score - full.score))
    digits = 1 if scale > 1 else 2
    score = f"{scale * result.score.mean():.{digits}f}"
    score = f"**{score}**" if low <= 0 <= high else score
    return f"{score}<br>{low:+.{digits}f} to {high:+.{digits}f}"


def _means(results: Sequence[Result | None], names: Sequence[str]) -> str:
    known = [result for result in results if result is not None]
    if not known:
        return ""
    means = [np.mean([np.nanmean(getattr(result, name)) for result in known]) for name in names]
    return " / ".join(f"{100 * mean:.1f}" for mean in means)


def _cost(results: Sequence[Result | None]) -> str:
    known = [result for result in results if result is not None]
    if not known:
        return ""
    kept = np.mean([result.kept.mean() for result in known])
    share = np.mean([result.state_bytes / result.full_bytes for result in known])
    return f"{100 * kept:.2f} / {100 * share:.1f}"
