"""`vlcache-jax generate`: one prompt about some images."""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlcache_jax.cli.checkpoint import OpenedCheckpoint, keep_programs, open_asked
from vlcache_jax.cli.options import check_picture_path
from vlcache_jax.cli.process import emit, remark
from vlcache_jax.cli.runtime import describe_runtime
from vlcache_jax.errors import InputError
from vlcache_jax.evaluation.answering import Answers, answer
from vlcache_jax.files.writing import write_picture
from vlcache_jax.inference.recipe import recipe_by_name
from vlcache_jax.inference.report import PrefillReport, Report
from vlcache_jax.inference.sampling import Sampling
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.images.opening import load_image
from vlcache_jax.models.images.video import Video
from vlcache_jax.models.images.video_file import check_video_file
from vlcache_jax.models.processor import Processor
from vlcache_jax.models.text.arguments import Visual
from vlcache_jax.policies.budget import budget_text, budget_value
from vlcache_jax.terminal import words
from vlcache_jax.terminal.progress import Progress
from vlcache_jax.terminal.table import megabytes, percent


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Runs the command; everything that can be checked is checked before weights are read."""
    picture_path = check_picture_path(arguments.explain)
    recipe = recipe_by_name(arguments.policy)
    drawn = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    drawn = {name: value for name, value in drawn.items() if value is not None}
    sampling = Sampling(**drawn) if drawn else None
    if not arguments.prompt.strip():
        raise InputError("the prompt is empty: give --prompt a text")
    progress.step("reading the prompt")
    if arguments.frames is not None and not any(isinstance(path, words.VideoPath) for path in arguments.image):
        raise InputError("--frames is of a video: give one by --video, or leave it out")
    read = [_opened(path, number) for number, path in enumerate(arguments.image, 1)]
    opened = open_asked(arguments)
    images = [_video(x, opened, arguments.frames) if isinstance(x, words.VideoPath) else x for x in read]
    batch = make_batch(opened, images, arguments.prompt, arguments.raw)
    opened.check(batch, recipe, arguments.max_new_tokens)
    visual = int((np.asarray(batch.vision_index) != TEXT).sum())
    progress.note(f"the prompt has {int(batch.lengths[0])} tokens, {visual} of them visual")
    keep_programs(not arguments.no_compilation_cache, progress)

    progress.step("loading the weights")
    start = time.monotonic()
    vlm = opened.load()
    load_seconds = time.monotonic() - start
    printer = _Printer(vlm.processor) if arguments.stream else None
    answers = answer(
        vlm,
        batch,
        recipe,
        arguments.max_new_tokens,
        progress,
        sampling=sampling,
        seed=arguments.seed,
        on_token=printer,
    )
    progress.close()
    text = vlm.processor.decode(answers)[0]
    answers.seconds["load"] = load_seconds
    if arguments.json:
        emit(json.dumps(_describe(arguments, opened, batch, answers, text), ensure_ascii=False, indent=2))
    else:
        emit(printer.rest() if printer else text)
        remark(_summary(batch, answers, recipe.policy.settled(vlm.model.spec).evicted.bits is not None))
    if picture_path is not None:
        write_picture(picture_path, answers.picture(vlm, images, batch, arguments.prompt, text))


def _opened(path: str, number: int) -> Any:
    """An image; of a video its path, which is one of a file."""
    if not isinstance(path, words.VideoPath):
        return load_image(path, f"image {number}")
    check_video_file(path)
    return path


def _video(path: str, opened: OpenedCheckpoint, frames: int | None) -> Video:
    sampling = opened.processor.sampling
    if sampling is None:
        raise InputError(
            f"--video {words.shown(path)}: a {opened.model.config.model_type} takes no videos: give some of its frames "
            "by --image"
        )
    return Video.from_file(path, sampling if frames is None else sampling.changed(num_frames=frames))


def make_batch(opened: OpenedCheckpoint, images: Sequence[Visual], prompt: str, raw: bool) -> Batch:
    """A batch of one prompt, by the chat template unless `raw` or there is none.

    Raises InputError if placeholders and images do not match, or the prompt is empty.
    """
    processor = opened.processor
    if raw or not processor.has_chat_template:
        return processor(images=[images], text=[prompt])
    parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    if not any(token in prompt for token in (processor.image_token, processor.video_token) if token):
        kinds = ["video" if isinstance(image, Video) else "image" for image in images]
        parts = [{"type": kind, kind: image} for kind, image in zip(kinds, images)] + parts
        return processor.chat([[{"role": "user", "content": parts}]])
    # Templates put images in front of the text; here the text has placed them already.
    return processor.chat([[{"role": "user", "content": parts}]], images=[images])


class _Printer:
    """Prints tokens as they come."""

    def __init__(self, processor: Processor) -> None:
        self._stream = processor.tokenizer.decode_stream()

    def __call__(self, token: int) -> None:
        emit(self._stream.push(token), end="")

    def rest(self) -> str:
        """What was held back at the end, such as half a character."""
        return self._stream.finish()


def _summary(batch: Batch, answers: Answers, coded: bool) -> str:
    """The line behind an answer; `coded`: the tokens that are not kept are there at fewer bits."""
    report, tokens = answers.report, int(answers.lengths[0])
    stages = np.asarray(report.stage_tokens)[0].tolist()
    dropped = f" ({' > '.join(map(str, stages))} from layer to layer)" if len(stages) > 1 else ""
    times = ", ".join(f"{name} {value:.2f} s" for name, value in answers.seconds.items())
    others = ", the others at fewer bits" if coded else ""
    short = "" if report.exact[0] else ", less than a layer wanted (candidate_fraction=1)"
    return (
        f"[{report.policy}, budget {budget_text(report.budget)}: kept {percent(float(report.kept_fraction[0]))} of "
        f"{int(batch.lengths[0])} prompt tokens{others}{dropped}{short}{_looked(report)}; cache held "
        f"{megabytes(report.held_bytes)}: prompt {megabytes(report.state_bytes)} instead of "
        f"{megabytes(report.full_bytes)}, room for the answer {megabytes(report.tail_bytes)}; {tokens} tokens; {times}]"
    )


def _looked(report: Report) -> str:
    found = report.prefill
    if found is None or found.why:
        return "" if found is None else f"; dense prefill: {found.why}"
    missing = int(np.sum(found.overflow))
    full = f", and had no room for {missing}" if missing else ""
    return f"; {found.pattern} looked at {percent(float(np.mean(found.density)))} of the blocks of attention{full}"


def _looks(found: PrefillReport) -> dict[str, Any]:
    return {
        "pattern": found.pattern,
        "density": [round(float(x), 4) for x in found.density[0]],
        "overflow": np.asarray(found.overflow)[0].tolist(),
        "dense_layers": list(found.dense_layers),
        "why": found.why,
    }


def _describe(
    arguments: argparse.Namespace, opened: OpenedCheckpoint, batch: Batch, answers: Answers, text: str
) -> dict[str, Any]:
    report, length = answers.report, int(answers.lengths[0])
    return {
        "answer": text,
        "tokens": length,
        "token_ids": answers.tokens[0, :length].tolist(),
        "prompt_tokens": int(batch.lengths[0]),
        "visual_tokens": int(np.sum(np.asarray(batch.vision_index) != TEXT)),
        "policy": report.policy,
        "budget": budget_value(report.budget),
        "kept": np.asarray(report.kept)[0].tolist(),
        "kept_fraction": float(report.kept_fraction[0]),
        "exact": bool(report.exact[0]),
        "stage_tokens": np.asarray(report.stage_tokens)[0].tolist(),
        **({} if report.prefill is None else {"prefill": _looks(report.prefill)}),
        "full_bytes": report.full_bytes,
        **answers.costs(),
        "model": arguments.model,
        "dtype": opened.dtype,
        "weights": opened.weights or "float",
        **describe_runtime(),
    }
