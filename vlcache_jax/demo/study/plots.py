"""Pictures of the figures: scores against budgets, and how methods share the budget among layers."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from vlcache_jax.demo.study.methods import Method
from vlcache_jax.demo.study.summary import Table
from vlcache_jax.demo.study.tasks import score_name

MAIN = ("vl_cache", "snap_kv", "pyramid_kv", "h2o", "streaming_llm", "tova", "prefix_kv", "expected_attention")
"""Methods that a picture of everything draws in colour."""

LOOK = {
    "font.size": 11, "axes.titlesize": 13, "axes.titlelocation": "left", "axes.edgecolor": "#dfe3e8", "axes.grid": True,
    "axes.grid.axis": "y", "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "grid.color": "#dfe3e8", "ytick.left": False, "xtick.labelsize": 9,
    "lines.linewidth": 1.8, "lines.markeredgecolor": "white", "lines.markersize": 7,
}  # fmt: skip
# Okabe and Ito's colours for all kinds of sight, and a few more.
_PALETTE = (
    *("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#785e3c", "#9646c8", "#145a3c", "#c8285a"),
)
_ORACLE = {"color": "#1c232b", "linestyle": "--"}
_RANDOM = {"color": "#68727d", "linestyle": ":"}
_PALE = {"color": "#d4d9df", "linewidth": 1.2}
_PER_CENT = PercentFormatter(1, 0, " %")
# From nothing, dark violet, through sand, to all of the full cache's score, green; monotone in lightness.
_SHADES = LinearSegmentedColormap.from_list(
    "score", [(0.0, "#542788"), (0.3, "#9678b4"), (0.6, "#f7debe"), (0.9, "#a6db9f"), (1.0, "#006d3c")]
)


def figure(width: float, height: float, title: str, text: str) -> Figure:
    """An empty one of so many inches, with a title and a line of text below it."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    drawn.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=18)
    drawn.text(0.01, 1 - 0.55 / height, text, color=_RANDOM["color"])
    return drawn


def picture(drawn: Figure) -> Image.Image:
    """A figure as an RGB image."""
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    looks = zip(names, itertools.cycle(_PALETTE), itertools.cycle("os^D"))
    return {name: {"color": colour, "marker": marker} for name, colour, marker in looks}


def _legend(drawn: Figure, axes: Any) -> None:
    """Of the lines in one of the panels that have a label."""
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=6, frameon=False)


def _panels(table: Table) -> tuple[list[str | None], int, int]:
    """The tasks, and None for their mean; and in how many rows and columns they are drawn."""
    panels = [*table.tasks, None]
    columns = 4 if len(panels) > 6 else min(len(panels), 3)
    return panels, -(-len(panels) // columns), columns


@rc_context(LOOK)
def scores_by_budget(table: Table, methods: Sequence[str], title: str) -> Image.Image:
    """One panel for each task, and one for their mean relative to the full cache.

    Args:
      table: the results.
      methods: drawn in colour; random and the oracle are added in black and grey, all others pale behind.
      title: of the picture.
    """
    styles = _styles([name for name in methods if name in table.methods])
    oracles = [name for name in ("oracle_by_mass", "oracle") if name in table.methods and name not in styles]
    styles |= dict.fromkeys(oracles[:1], _ORACLE)
    if "random" in table.methods:
        styles.setdefault("random", _RANDOM)
    behind = [name for name in table.methods if name not in styles]
    labels = {name: Method(name).label for name in styles} | dict.fromkeys(behind[:1], "all other methods")
    panels, rows, columns = _panels(table)
    text = f"{table.samples} held-out samples a task; budget: share of the prompt's cache that is kept"
    drawn = figure(5.4 * columns, 3.6 * rows + 1.6, title, text)
    for task, axes in itertools.zip_longest(panels, drawn.subplots(rows, columns, squeeze=False).flat, fillvalue=""):
        if task == "":
            axes.set_axis_off()
            continue
        top = 10.0 if task is not None and score_name(task) == "CIDEr" else 1.0
        for method in [*behind, *styles]:
            known = [(b, value) for b in table.budgets if (value := table.value(task, method, b)) is not None]
            axes.plot(*np.array(known).reshape(-1, 2).T, label=labels.get(method), **styles.get(method, _PALE))
        axes.set(xscale="log", ylim=(0, 1.04 * top))
        axes.set_title("Mean of all tasks, of the full cache's score" if task is None else table.title(task))
        axes.set_xticks(table.budgets, [f"{100 * budget:g} %" for budget in table.budgets])
        axes.minorticks_off()
        if top == 1:
            axes.yaxis.set_major_formatter(_PER_CENT)
    _legend(drawn, drawn.axes[0])
    return picture(drawn)


@rc_context(LOOK)
def all_scores(table: Table) -> Image.Image:
    """Every method at every budget as a coloured table, one block for each task; the best methods first."""
    methods, budgets = table.by_rank(), [budget for budget in table.budgets if budget < 1]
    panels, rows, columns = _panels(table)
    drawn = figure(
        2.4 + columns * 0.6 * len(budgets),
        1.2 + rows * (0.28 * len(methods) + 0.8),
        "Every method at every budget, in per cent of the full cache's score",
        "Methods by the mean over tasks and budgets. 100 % means: as good as without compression",
    )
    for task, axes in itertools.zip_longest(panels, drawn.subplots(rows, columns, squeeze=False).flat, fillvalue=""):
        if task == "":
            axes.set_axis_off()
            continue
        values = [[table.relative(task, method, budget) for budget in budgets] for method in methods]
        shown = np.array(values, float)
        axes.imshow(shown, _SHADES, vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(shown):
            ink = "white" if value < 0.3 or value > 0.97 else "black"
            axes.text(column, row, "" if np.isnan(value) else f"{100 * value:.0f}", color=ink, ha="center", va="center")
        axes.set_title("Mean of all tasks" if task is None else table.title(task, short=True))
        axes.set(xticks=range(len(budgets)), xticklabels=[f"{100 * budget:g} %" for budget in budgets])
        first = axes.get_subplotspec().is_first_col()
        axes.set_yticks(range(len(methods)), [Method(name).label for name in methods] if first else [])
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.grid(False)
    return picture(drawn)


@rc_context(LOOK)
def layers(table: Table, methods: Sequence[str], budget: float) -> Image.Image:
    """For each task the density of every layer, and what share of the prompt methods keep there."""
    styles = _styles([name for name in methods if table.result(table.tasks[0], name, budget) is not None])
    styles |= {"oracle_by_mass": _ORACLE} if "oracle_by_mass" in table.methods else {}
    title = f"Layers: density of attention, and budgets at {100 * budget:g} %"
    text = "Density: share of the question's attention entries above 1 % of their row's largest"
    drawn = figure(max(3.2 * len(table.tasks) + 0.8, 10), 7.4, title, text)
    grid = drawn.subplots(2, len(table.tasks), sharey="row", squeeze=False)
    for task, (above, below) in zip(table.tasks, grid.T):
        above.set_title(table.title(task, short=True))
        density = table.density(task, budget)
        if density is not None:
            above.bar(range(len(density)), density, 0.6, color=_PALETTE[1])
        for name, style in styles.items():
            if (result := table.result(task, name, budget)) is not None:
                below.plot(result.layers, label=Method(name).label, **style)
        below.set_xlabel("layer")
        for axes in (above, below):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes, label in zip(grid[:, 0], ("density", "kept share of the prompt")):
        axes.set(ylabel=label, ylim=(0, None))
        axes.yaxis.set_major_formatter(_PER_CENT)
    _legend(drawn, grid[1, 0])
    return picture(drawn)
