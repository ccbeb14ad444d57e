"""What the size of the cache that answers are drawn with does to GRPO, and what importance weights make up for.

Runs `examples/rollouts.py` with the full cache, a fifth and a tenth of it, with and without the weights, from the same
disturbed demo model; then prints a table and draws the rewards. A run that was cut goes on from its last state, and one
that has ended is only read.

    python benchmarks/grpo.py --runs grpo --plot docs/grpo.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

import harness
import numpy as np

from vlcache_jax.errors import InputError
from vlcache_jax.files.writing import make_folder, replacing

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import rollouts

RUNS = {
    "full cache": ["--budget", "1"],
    "20 %": ["--budget", "0.2"],
    "20 %, uncorrected": ["--budget", "0.2", "--no-correction"],
    "10 %": ["--budget", "0.1"],
    "10 %, uncorrected": ["--budget", "0.1", "--no-correction"],
}
WINDOW = 10
"""Steps whose rewards are averaged."""


def folder_of(name: str, runs: Path) -> Path:
    return runs / name.replace(" %", "").replace(", ", "-").replace(" ", "-")


def read(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of the steps, and those of the evaluations between them; of a step that ran twice the last."""
    steps, evaluations = {}, {}
    for line in map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()):
        (steps if "reward" in line else evaluations)[line["step"]] = line
    return [steps[i] for i in sorted(steps)], [evaluations[i] for i in sorted(evaluations)]


def draw(rewards: dict[str, list[float]], path: Path) -> None:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'vlcache-jax[plots]'") from error
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, values in rewards.items():
        means = np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")
        color = f"C{list(dict.fromkeys(x.split(',')[0] for x in RUNS)).index(name.split(',')[0])}"
        style = "--" if "uncorrected" in name else "-"
        axes.plot(np.arange(len(means)) + WINDOW, means, style, color=color, label=name)
    axes.set(xlabel="step", ylabel=f"reward, mean of {WINDOW} steps", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(title="cache that answers are drawn with", fontsize="small")
    with rc_context({"svg.hashsalt": "grpo", "svg.fonttype": "none"}), replacing(path) as stream:
        figure.savefig(stream, format=path.suffix.lstrip("."), metadata={"Date": None})


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--only", choices=RUNS, action="append", help="this one; repeat")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an .svg or .png of the rewards")
    args, options = parser.parse_known_args()  # others are the example's
    make_folder(args.runs)
    lines, records, rewards = [], [], {}
    for name in args.only or RUNS:
        folder = folder_of(name, args.runs)
        rollouts.main(["--output", str(folder), *RUNS[name], *options])
        steps, (first, *_, last) = read(folder)
        rewards[name] = [line["reward"] for line in steps]
        starts, ends = rewards[name][:WINDOW], rewards[name][-WINDOW:]
        mismatch = float(np.mean([line["mismatch"] for line in steps]))
        record = {"name": name, "steps": len(steps), "mismatch": mismatch, "rewards": rewards[name]}
        record |= {f"{x}_{when}": line[f"accuracy_{x}"] for x in ("full", "kept") for when, line in
                   (("before", first), ("after", last))}  # fmt: skip
        records.append(record)
        lines.append([
            name, f"{np.mean(starts):.2f}", f"{np.mean(ends):.2f}", f"{mismatch:.3f}",
            *(f"{first[f'accuracy_{x}']:.2f} to {last[f'accuracy_{x}']:.2f}" for x in ("full", "kept")),
        ])  # fmt: skip
    header = ["answers drawn with", f"reward, first {WINDOW} steps", f"last {WINDOW}", "mismatch, nats a token"]
    harness.table([*header, "accuracy, full cache", "accuracy, that cache"], lines)
    if args.plot is not None:
        draw(rewards, args.plot)
    settings = {name: str(value) for name, value in vars(args).items() if name != "json"} | {"options": options}
    harness.finish("grpo", settings, records, args.json)


if __name__ == "__main__":
    main()
