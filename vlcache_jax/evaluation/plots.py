"""Pictures of evaluations: scores over what was kept, and samples a second. The extra `plots` installs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlcache_jax.errors import InputError
from vlcache_jax.evaluation.report import Summary
from vlcache_jax.evaluation.speed import Speed
from vlcache_jax.files.writing import make_folder, replacing


def write_plots(
    found: Mapping[str, Sequence[Summary]], speeds: Mapping[str, Sequence[Speed]], folder: Path
) -> list[Path]:
    """Writes scores.png and, if any evaluation has ended, throughput.png.

    Args:
      found: the summaries of each evaluation, by its name.
      speeds: and how fast they ran.
      folder: made if need be.

    Returns:
      The files.

    Raises:
      InputError: matplotlib is missing, or the folder cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'vlcache-jax[plots]'") from error
    make_folder(folder)
    found = {name: [one for one in some if one.score is not None] for name, some in found.items()}
    pictures = {"scores.png": _scores(Figure, {name: some for name, some in found.items() if some})}
    if any(speeds.values()):
        pictures["throughput.png"] = _throughput(Figure, speeds)
    paths = [folder / name for name, figure in pictures.items() if figure is not None]
    for path in paths:
        with replacing(path) as stream:
            pictures[path.name].savefig(stream, format="png", dpi=150)
    return paths


def _scores(figure: Any, found: Mapping[str, Sequence[Summary]]) -> Any:
    """A panel for each evaluation: a line for each method over the kept fraction, with 95 % intervals."""
    if not found:
        return None
    drawn = figure(figsize=(6.4 * len(found), 4.4), layout="constrained")
    for axes, (name, some) in zip(drawn.subplots(1, len(found), squeeze=False)[0], found.items()):
        methods: dict[str, list[Summary]] = {}
        for one in some:
            methods.setdefault(_method(one.policy), []).append(one)
        for method, points in methods.items():
            points = sorted(points, key=lambda one: one.kept_fraction or 0.0)
            means = [one.score.mean for one in points]  # type: ignore[union-attr]
            bounds = [(one.score.mean - one.score.low, one.score.high - one.score.mean) for one in points]  # type: ignore[union-attr]
            kept = [one.kept_fraction or 0.0 for one in points]
            axes.errorbar(kept, means, list(zip(*bounds)), label=method, marker="o", capsize=3)
            if method == "full_cache":
                axes.axhline(means[0], color="grey", linestyle=":", zorder=0)
        axes.set(xlabel="kept fraction of the prompt's cache", ylabel=some[0].metric, title=name, xlim=(0, 1.04))
        axes.grid(alpha=0.3)
        axes.legend()
    return drawn


def _throughput(figure: Any, speeds: Mapping[str, Sequence[Speed]]) -> Any:
    """A bar for each policy of each evaluation."""
    names = [
        f"{one.policy}\n{name}" if len(speeds) > 1 else one.policy for name, some in speeds.items() for one in some
    ]
    rates = [one.samples_per_second for some in speeds.values() for one in some]
    drawn = figure(figsize=(6.4, 1 + 0.5 * len(rates)), layout="constrained")
    axes = drawn.subplots()
    axes.bar_label(axes.barh(names, rates), fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="samples a second")
    axes.margins(x=0.12)
    return drawn


def _method(policy: str) -> str:
    """A policy's text without its budget: "vl_cache:0.1,sink=4" -> "vl_cache,sink=4"."""
    name, _, rest = policy.partition(":")
    _, comma, options = rest.partition(",")
    return f"{name}{comma}{options}"
