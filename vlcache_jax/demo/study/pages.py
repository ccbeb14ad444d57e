"""Writing tables and pictures beside the results."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vlcache_jax.demo.study.results import ResultFile
from vlcache_jax.demo.study.run import BEFORE
from vlcache_jax.demo.study.summary import Table, tables
from vlcache_jax.files.writing import write_picture, write_text

_LAYERS = ("vl_cache", "pyramid_kv", "prefix_kv", "air_cache", "snap_kv")
_HEAT_MAPS = ("vl_cache", "snap_kv", "h2o", "expected_attention", "oracle")
_PICTURED_TASKS = ("documents", "scenes")


def write_pages(file: ResultFile, folder: Path) -> list[Path]:
    """Writes `tables.md` and the pictures that the results allow; returns their paths.

    Warns where pictures are left out for want of matplotlib.
    """
    table, before = Table(file), Table(file, BEFORE)
    written = [folder / "tables.md"]
    write_text(written[0], _HEADER + "# Tables\n\n" + tables(table))
    if before.methods:
        written.append(folder / "tables_before.md")
        title = "# Tables: compressed before the question is known\n\n"
        write_text(written[1], _HEADER + title + tables(before))
    if len(table.budgets) < 2:
        return written
    try:
        from vlcache_jax.demo.study import heat_maps, plots
    except ImportError:
        warnings.warn("the pictures need matplotlib: pip install 'vlcache-jax[plots]'", stacklevel=2)
        return written
    variants = [name for name in table.methods if name.startswith(("vl_cache", "snap_kv"))]
    pictures: dict[str, Image.Image] = {
        "scores.png": plots.scores_by_budget(table, plots.MAIN, "Score against budget"),
        "all_scores.png": plots.all_scores(table),
    }
    if before.methods:
        title = "Score against budget, compressed before the question is known"
        pictures["before.png"] = plots.scores_by_budget(before, before.by_rank()[:9], title)
    if len(variants) > 2:
        pictures["variants.png"] = plots.scores_by_budget(table, variants, "One ranking per layer, and pooled scores")
    pictured = {budget for _, _, budget in file.kept}
    if pictured:
        budget = min(pictured, key=lambda b: abs(b - 0.1))
        if table.result(table.tasks[0], "vl_cache", budget) is not None:
            pictures["layers.png"] = plots.layers(table, _LAYERS, budget)
        for task in _PICTURED_TASKS:
            lines = heat_maps.choose(file.kept, task, _pictured(table.methods))
            if lines:
                pictures[f"kept_{task}.png"] = heat_maps.kept_tokens(task, budget, lines)
    for name, picture in pictures.items():
        write_picture(folder / name, picture.quantize(128, dither=Image.Dither.NONE), optimize=True)
        written.append(folder / name)
    return written


def _pictured(methods: Sequence[str]) -> list[str]:
    """Five methods for the heat maps: the usual ones, others in their place where some were not measured."""
    chosen = [name for name in _HEAT_MAPS if name in methods]
    return (chosen + [name for name in methods if name not in chosen])[:5]


_HEADER = "<!-- Written by `vlcache-jax study` from results.jsonl. -->\n\n"
