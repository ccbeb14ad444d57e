"""Pictures of the figures: scores against budgets, and how methods share the budget among layers."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlcache_jax.demo.study import drawing
from vlcache_jax.demo.study.drawing import GREY, INK, LINE, PALETTE, TRACK, Colour, Sheet
from vlcache_jax.demo.study.methods import Method
from vlcache_jax.demo.study.summary import Table
from vlcache_jax.demo.study.tasks import score_name

_MARGIN = 48
_PANEL, _HEIGHT = 500, 330  # a panel's width and height, axis labels included

MAIN = ("vl_cache", "snap_kv", "pyramid_kv", "h2o", "streaming_llm", "tova", "prefix_kv", "expected_attention")
"""Methods that a picture of everything draws in colour."""


def scores_by_budget(table: Table, methods: Sequence[str], title: str) -> Image.Image:
    """One panel for each task, and one for their mean relative to the full cache.

    Args:
      table: the results.
      methods: drawn in colour; random and the oracle are added in black and grey, all others pale behind.
      title: of the picture.
    """
    panels = [*table.tasks, None]
    columns = 4 if len(panels) > 6 else 3
    rows = -(-len(panels) // columns)
    shown = [name for name in methods if name in table.methods]
    styles = _styles(shown)
    oracles = [name for name in ("oracle_by_mass", "oracle") if name in table.methods and name not in styles]
    styles |= dict.fromkeys(oracles[:1], _ORACLE)
    if "random" in table.methods:
        styles.setdefault("random", (GREY, (3, 5), -1))
    behind = [name for name in table.methods if name not in styles]
    width = 2 * _MARGIN + columns * _PANEL + (columns - 1) * 24
    legend = _legend_height(styles, width, bool(behind))
    text = f"{table.samples} held-out samples a task; budget: share of the prompt's cache that is kept"
    sheet = _sheet(width, 104 + rows * (_HEIGHT + 64) + legend, title, text, large=True)
    for number, task in enumerate(panels):
        x = _MARGIN + number % columns * (_PANEL + 24)
        y = 104 + number // columns * (_HEIGHT + 64)
        _panel(sheet, x, y, table, task, styles, behind)
    _legend(sheet, 104 + rows * (_HEIGHT + 64) + 16, styles, bool(behind))
    return sheet.picture()


Style = tuple[Colour, Sequence[float], int]  # colour, dash, marker (-1: none)

_ORACLE: Style = (INK, (10, 5), -1)


def _sheet(width: int, height: int, title: str, text: str, large: bool = False) -> Sheet:
    sheet = Sheet(width, height)
    sheet.text(_MARGIN, 50, title, 30 if large else 28)
    sheet.text(_MARGIN, 80, text, 18 if large else 17, GREY)
    return sheet


def _levels(
    sheet: Sheet, left: float, right: float, upper: float, lower: float, marks: Sequence[str], gap: float = 6
) -> None:
    """Horizontal lines of equal distance, the lowest first, with what they mean."""
    for i, mark in enumerate(marks):
        height = lower - (lower - upper) * i / (len(marks) - 1)
        sheet.line([(left, height), (right, height)], LINE, 1)
        sheet.text(left - gap, height, mark, 15, GREY, "rm")


def _styles(names: Sequence[str]) -> dict[str, Style]:
    return {name: (PALETTE[i % len(PALETTE)], (), i) for i, name in enumerate(names)}


def _panel(
    sheet: Sheet,
    x: float,
    y: float,
    table: Table,
    task: str | None,
    styles: dict[str, Style],
    behind: Sequence[str],
) -> None:
    top = 10.0 if task is not None and score_name(task) == "CIDEr" else 1.0
    name = "Mean of all tasks, of the full cache's score" if task is None else table.title(task)
    sheet.text(x, y + 22, name, 20)
    left, right, upper, lower = x + 44, x + _PANEL - 8, y + 42, y + _HEIGHT
    budgets = table.budgets
    low, high = math.log(budgets[0]), math.log(1.0)
    span = max(high - low, 1e-9)

    def place(budget: float, value: float) -> tuple[float, float]:
        across = left + 12 + (right - left - 24) * (math.log(budget) - low) / span
        return across, lower - (lower - upper) * min(value / top, 1.04)

    _levels(sheet, left, right, upper, lower, [f"{2 * i}" if top > 1 else f"{20 * i} %" for i in range(6)])
    for budget in budgets:
        across = place(budget, 0)[0]
        sheet.line([(across, lower), (across, lower + 5)], GREY, 1)
        sheet.text(across, lower + 22, f"{100 * budget:g} %", 15, GREY, "ms")

    def curve(method: str) -> list[tuple[float, float]]:
        values = [(budget, table.value(task, method, budget)) for budget in budgets]
        return [place(budget, value) for budget, value in values if value is not None]

    for method in behind:
        sheet.line(curve(method), (212, 217, 223), 1.5)
    for method, (colour, dash, _) in styles.items():
        sheet.line(curve(method), colour, 2.5, dash)
    for method, (colour, _, marker) in styles.items():
        for point in curve(method) if marker >= 0 else ():
            sheet.marker(*point, colour, marker)


def _legend_places(styles: dict[str, Style], width: int, more: bool) -> tuple[list[tuple[str, float, float]], float]:
    x, y, places = float(_MARGIN), 0.0, []
    for name in [*styles, *([""] if more else [])]:
        size = 52 + drawing.text_width(_legend_text(name), 18) + 30
        if x + size > width - _MARGIN and x > _MARGIN:
            x, y = float(_MARGIN), y + 32
        places.append((name, x, y))
        x += size
    return places, y + 32


def _legend_text(name: str) -> str:
    return Method(name).label if name else "all other methods"


def _legend_height(styles: dict[str, Style], width: int, more: bool) -> int:
    return round(_legend_places(styles, width, more)[1]) + 44


def _legend(sheet: Sheet, y: float, styles: dict[str, Style], more: bool) -> None:
    for name, x, below in _legend_places(styles, sheet.width, more)[0]:
        colour, dash, marker = styles.get(name, ((200, 206, 213), (), -1))
        middle = y + below + 10
        sheet.line([(x, middle), (x + 42, middle)], colour, 2.5, dash)
        if marker >= 0:
            sheet.marker(x + 21, middle, colour, marker)
        sheet.text(x + 52, middle, _legend_text(name), 18, INK, "lm")


def all_scores(table: Table) -> Image.Image:
    """Every method at every budget as a coloured table, one block for each task; the best methods first."""
    methods, budgets = table.by_rank(), [budget for budget in table.budgets if budget < 1]
    names = max(drawing.text_width(Method(name).label, 16) for name in methods) + 16
    cell, height = 50, 26
    block = cell * len(budgets) + 30
    panels = [*table.tasks, None]
    columns = 4 if len(panels) > 6 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    width = round(2 * _MARGIN + names + columns * block)
    title = "Every method at every budget, in per cent of the full cache's score"
    text = "Methods by the mean over tasks and budgets. 100 % means: as good as without compression"
    sheet = _sheet(width, 110 + rows * (len(methods) * height + 96), title, text)
    for number, task in enumerate(panels):
        left = _MARGIN + names + number % columns * block
        top = 110 + number // columns * (len(methods) * height + 96)
        sheet.text(left, top + 20, "Mean of all tasks" if task is None else table.title(task, short=True), 18)
        for i, budget in enumerate(budgets):
            sheet.text(left + cell * i + cell / 2, top + 46, f"{100 * budget:g} %", 15, GREY, "ms")
        for j, method in enumerate(methods):
            y = top + 56 + j * height
            if number % columns == 0:
                sheet.text(_MARGIN, y + height / 2, Method(method).label, 16, INK, "lm")
            for i, budget in enumerate(budgets):
                value = table.relative(task, method, budget)
                colour = TRACK if value is None else _shade(value)
                sheet.rectangle(left + cell * i + 1, y + 1, left + cell * (i + 1) - 1, y + height - 1, colour)
                if value is not None:
                    ink = drawing.PAPER if value < 0.3 or value > 0.97 else INK
                    sheet.text(left + cell * (i + 0.5), y + height / 2, f"{100 * value:.0f}", 15, ink, "mm")
    return sheet.picture()


def _shade(value: float) -> Colour:
    """Dark violet for nothing, through sand, to green for all of the full cache's score; monotone in lightness."""
    stops = ((0.0, (84, 39, 136)), (0.3, (150, 120, 180)), (0.6, (247, 222, 190)), (0.9, (166, 219, 160)))
    last = (1.0, (0, 109, 60))
    for (low, dark), (high, light) in zip(stops, (*stops[1:], last)):
        if value <= high:
            return drawing.mix(dark, light, (value - low) / (high - low))
    return last[1]


def layers(table: Table, methods: Sequence[str], budget: float) -> Image.Image:
    """For each task the density of every layer, and what share of the prompt methods keep there."""
    shown = [name for name in methods if table.result(table.tasks[0], name, budget) is not None]
    styles = _styles(shown) | ({"oracle_by_mass": _ORACLE} if "oracle_by_mass" in table.methods else {})
    panel, height = 300, 250
    width = max(2 * _MARGIN + 60 + len(table.tasks) * panel, 1000)
    bottom = 104 + 2 * (height + 90)
    title = f"Layers: density of attention, and budgets at {100 * budget:g} %"
    text = "Density: share of the question's attention entries above 1 % of their row's largest"
    sheet = _sheet(width, bottom + _legend_height(styles, width, False), title, text)
    densities = {task: table.density(task, budget) for task in table.tasks}
    kept = {
        (task, name): result.layers
        for task in table.tasks
        for name in styles
        if (result := table.result(task, name, budget)) is not None
    }
    tops = (
        _round_up(max((float(np.max(d)) for d in densities.values() if d is not None), default=1.0)),
        _round_up(max((float(np.max(x)) for x in kept.values()), default=1.0)),
    )
    count = len(next(iter(kept.values())))
    for number, task in enumerate(table.tasks):
        x = _MARGIN + 60 + number * panel
        for row, top in enumerate(tops):
            y = 104 + row * (height + 90)
            if row == 0:
                sheet.text(x, y + 24, table.title(task, short=True), 20)
            if number == 0:
                sheet.text(_MARGIN, y + 52, "density" if row == 0 else "kept share of the prompt", 16, GREY)
            upper, lower, right = y + 66, y + height + 30, x + panel - 36
            marks = [f"{25 * top * i:g} %" if number == 0 else "" for i in range(5)]
            _levels(sheet, x, right, upper, lower, marks, gap=8)
            step = (right - x) / count
            columns = [x + step * (layer + 0.5) for layer in range(count)]
            for layer, at in enumerate(columns):
                sheet.text(at, lower + 22, str(layer), 15, GREY, "ms")
            curves: dict[str | None, np.ndarray | None] = {None: densities[task]}
            if row:
                curves = {name: kept.get((task, name)) for name in styles}
            for name, values in curves.items():
                if values is None:
                    continue
                points = [(at, lower - (lower - upper) * float(value) / top) for at, value in zip(columns, values)]
                if name is None:
                    for at, level in points:
                        sheet.rectangle(at - step * 0.3, level, at + step * 0.3, lower, PALETTE[1], 3)
                    continue
                colour, dash, marker = styles[name]
                sheet.line(points, colour, 2.5, dash)
                for point in points if marker >= 0 else ():
                    sheet.marker(*point, colour, marker)
    sheet.text(width / 2, bottom - 2, "layer", 16, GREY, "ms")
    _legend(sheet, bottom + 16, styles, False)
    return sheet.picture()


def _round_up(value: float) -> float:
    """The next number of 1, 2, 4 or 8 times a power of ten: it has round quarters."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-6)))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value * 0.999)
