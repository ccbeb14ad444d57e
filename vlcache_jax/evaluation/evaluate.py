"""`evaluate`: all samples of some files through the engine, policy after policy, into a folder."""

import dataclasses
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from vlcache_jax.engine.engine import Engine
from vlcache_jax.engine.memory import usual_rows
from vlcache_jax.engine.requests import Request, Result
from vlcache_jax.errors import InputError, PolicyWarning
from vlcache_jax.evaluation.fidelity import check_policies, measure
from vlcache_jax.evaluation.report import Summary, summarise
from vlcache_jax.evaluation.run_folder import RunFolder
from vlcache_jax.evaluation.sample import Sample
from vlcache_jax.evaluation.samples import find_files, read_samples
from vlcache_jax.evaluation.tasks import Task, task_by_name
from vlcache_jax.files.writing import only_writer
from vlcache_jax.inference.recipe import Recipe, recipe_by_name
from vlcache_jax.models.families.family import SizedLayout
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.terminal.progress import Progress
from vlcache_jax.terminal.table import percent


def evaluate(
    vlm: VLM,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    policies: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    task: str = "jsonl",
    compare: str | None = None,
    divergence: bool = False,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    suffix: str | None = None,
    metric: str | None = None,
    name: str = "",
    share: tuple[int, int] | None = None,
    progress: Progress | None = None,
    **engine: Any,
) -> list[Summary]:
    """Answers every sample of some files under each policy, and scores the answers.

    Each answer is a line in the folder as soon as it is there. Whatever stops the program, the same call goes on where
    it was, and ends with the same table.

    Args:
      vlm: the loaded checkpoint.
      data: files, folders or patterns: JSON lines, VLMEvalKit's TSV, lmms-eval's parquet; docs/evaluation.md.
      policies: policies or recipes as typed, such as "vl_cache:0.1" or "vl_cache:0.1 + fast_v:0.25", or a list of such.
      out: the folder.
      task: prompts, length and metric, by name; "jsonl" asks the questions as they are.
      compare: a policy whose answers to the same samples the others are compared with, such as "full_cache".
      divergence: also measure what each policy changes of the distributions of tokens, along the answers of `compare`:
        the Kullback-Leibler divergence from it, and how often the likeliest token is the same. Needs no right answers;
        every prompt is read once more for each policy.
      limit: only the first samples.
      max_new_tokens, suffix, metric: other than the task's.
      name: of the model, for the folder: another one cannot go on there.
      share: (i, n) answers every n-th sample, from the i-th on (0 to n - 1): n programs, on as many hosts or devices,
        share the work, and any of them may be started again. By default JAX's processes do so, where there are several.
      progress: shows samples and tokens a second, rows in flight and what is kept; nothing by default.
      **engine: options of `vlc.Engine`.

    Returns:
      A summary for each policy, of what all programs have answered so far.

    Raises:
      InputError: files that are none, columns or ids that are wrong, an unknown task or metric, or a folder that holds
        another evaluation, with the differences.

    Example:
      vlc.evaluate(vlm, "docvqa.jsonl", ["vl_cache:0.1"], "run", task="docvqa", compare="full_cache")
    """
    progress = Progress(enabled=False) if progress is None else progress
    asked = task_by_name(task, max_new_tokens=max_new_tokens, suffix=suffix, metric=metric)
    names = [policies] if isinstance(policies, str) else list(policies)
    names += [compare] if compare is not None and compare not in names else []
    known = {text: recipe_by_name(text) for text in names}
    if divergence and compare is None:
        raise InputError("divergence=True needs a policy to diverge from: give compare='full_cache'")
    if divergence:
        check_policies(recipe.policy for recipe in known.values())
    progress.step("reading the data")
    files = find_files([data] if isinstance(data, str | os.PathLike) else data)
    ids = [sample.id for sample in _first(read_samples(files), limit)]
    if not ids:
        raise InputError(f"there are no samples in {', '.join(map(str, files))}: check the files")
    settings = {
        "model": name,
        "dtype": str(jax.numpy.dtype(vlm.model.spec.dtype)),
        "weights": str(vlm.model.weights or "float"),
        "data": [{"file": file.name, "bytes": file.stat().st_size} for file in files],
        "task": task,
        **dataclasses.asdict(asked),
    }
    layout = vlm.processor.layout
    if isinstance(layout, SizedLayout):
        settings["image_pixels"] = [layout.min_pixels, layout.max_pixels]
    index, count = share or (jax.process_index(), jax.process_count())
    if not 0 <= index < count:
        raise InputError(f"share={share}: give (i, n), i from 0 to n - 1")
    folder = RunFolder.begin(Path(out), settings, f"part-{index}-of-{count}" if count > 1 else "")
    own = ids[index::count]
    with only_writer(folder.own):
        for text, recipe in known.items():
            done = folder.results(text)
            if missing := {name for name in own if name not in done}:
                one = _OnePolicy(vlm, folder, text, asked, progress, missing)
                one.run(lambda: _first(read_samples(files), limit), recipe, engine)
        if divergence and compare is not None:

            def requests() -> Iterator[Request]:
                return (asked.request(sample, vlm.processor) for sample in _first(read_samples(files), limit))

            measure(vlm, folder, known, compare, own, requests, engine, progress)
    progress.step("scoring")
    return summarise(folder, names, compare)


def _first(samples: Iterator[Sample], limit: int | None) -> Iterator[Sample]:
    for number, sample in enumerate(samples):
        if limit is not None and number >= limit:
            return
        yield sample


class _OnePolicy:
    """The samples that one policy has yet to answer."""

    def __init__(
        self, vlm: VLM, folder: RunFolder, name: str, task: Task, progress: Progress, missing: set[str]
    ) -> None:
        self._vlm, self._folder, self._name, self._task = vlm, folder, name, task
        self._progress, self._missing = progress, missing
        self._pending: dict[str, Sample] = {}

    def run(self, samples: Any, recipe: Recipe, options: dict[str, Any]) -> None:
        """Answers them."""
        sizes = self._folder.sizes(self._name)
        most = max([self._task.max_new_tokens, *(sample.max_new_tokens or 0 for sample in samples())])
        known = sizes or {"buckets": self._folder.buckets(), "most_rows": min(len(self._missing), usual_rows())}
        options = {"max_new_tokens": most, **known, **options} | (sizes or {})
        engine = Engine(self._vlm, recipe, **options)
        self._progress.step(f"{self._name}: measuring the prompts, and compiling")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PolicyWarning)
            stats = engine.warmup(self._task.request(sample, self._vlm.processor) for sample in samples())
            if sizes is None:
                sizes = {"buckets": [list(bucket.given) for bucket in engine.buckets], "rows": stats.rows}
                self._folder.add_start(self._name, {"sizes": sizes})
            self._progress.step(self._name, total=len(self._missing))
            kept, start = 0.0, time.monotonic()
            for number, result in enumerate(engine.run(self._requests(samples())), 1):
                self._folder.add(self._name, self._line(self._pending.pop(result.id), result))
                kept += result.kept_fraction or 0
                self._progress.advance()
                self._progress.describe(_describe(self._name, engine, number, kept, time.monotonic() - start))
        device = jax.local_devices()[0].device_kind
        line = {"stats": dataclasses.asdict(engine.stats()), "device": device, "devices": jax.local_device_count()}
        self._folder.add_start(self._name, line | {"jax": jax.__version__, "vlcache_jax": version("vlcache-jax")})

    def _requests(self, samples: Iterable[Sample]) -> Iterator[Request]:
        for sample in samples:
            if sample.id in self._missing:
                self._pending[sample.id] = dataclasses.replace(sample, images=())
                yield self._task.request(sample, self._vlm.processor)

    def _line(self, sample: Sample, result: Result) -> dict[str, Any]:
        line: dict[str, Any] = {**sample.more, "id": sample.id, "answers": list(sample.answers)}
        if result.ok:
            answer = (result.text or "").strip()
            score = self._task.score(sample, answer)
            line |= {"answer": answer, "score": score, "status": "ok", "finish": result.finish}
            line |= {"token_ids": result.tokens.tolist()}
        else:
            line |= {"answer": "", "score": None, "status": "failed", "reason": result.reason}
        return line | {
            "tokens": len(result.tokens),
            "prompt_tokens": result.prompt_tokens,
            "kept_fraction": result.kept_fraction,
            "exact": result.exact,
            "seconds": round(result.seconds, 4),
        }


def _describe(name: str, engine: Engine, number: int, kept: float, seconds: float) -> str:
    stats = engine.stats()
    return (
        f"{name}: {number / seconds:.2f} samples/s, {stats.tokens / seconds:.1f} tokens/s, {stats.rows_in_flight} of "
        f"{stats.rows} rows, {percent(kept / number)} kept"
    )
