"""`vlcache-jax demo`: the shipped checkpoint answers questions, with the full cache and with VL-Cache.

All questions form one batch, so that the whole demo compiles one prefill and one decoding program per policy.
"""

import argparse
import dataclasses
import json
import os
import textwrap
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from vlcache_jax.cli.answering import Answers, answer
from vlcache_jax.cli.checkpoint import OpenedCheckpoint, keep_programs, open_checkpoint
from vlcache_jax.cli.options import build_policy, check_picture_path
from vlcache_jax.cli.process import emit
from vlcache_jax.cli.runtime import describe_runtime
from vlcache_jax.cli.table import megabytes, percent, table
from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.explain.pictures import explain
from vlcache_jax.files.json_text import parse_json, shorten
from vlcache_jax.files.reading import read_plain
from vlcache_jax.files.writing import write_picture
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.images.opening import load_image
from vlcache_jax.policies import FullCache
from vlcache_jax.policies.budget import budget_text
from vlcache_jax.terminal.progress import Progress

MODEL, IMAGES, QUESTIONS = "demo_model", "demo_images", "questions.json"
MAX_NEW_TOKENS = 64
WIDTH = 92
OWN_IMAGE = (
    "this small model reads only pages, price lists and scenes of the kind it was trained on (see demo_images/ in the "
    "package); about any other image it makes something up. `vlcache-jax generate --model ...` asks a model of yours"
)


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of the demo.

    Attributes:
      task: what it is about, in a word.
      images: the images, upright RGB.
      question: the user's message.
      expected: the right answer; None for a question of the user's own.
    """

    task: str
    images: list[Image.Image]
    question: str
    expected: str | None


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Runs the command; everything that can be checked is checked before weights are read."""
    start = time.monotonic()
    picture_path = check_picture_path(arguments.explain)
    policy = build_policy("vl_cache", arguments.budget, [])
    if bool(arguments.image) != (arguments.question is not None):
        raise InputError("--image and --question belong together: give both, or neither for the shipped questions")
    assets = demo_assets(arguments.assets)
    if arguments.image and arguments.assets is None:
        progress.note(OWN_IMAGE)
    progress.step("reading images and questions")
    if arguments.image:
        images = [load_image(path, f"image {number}") for number, path in enumerate(arguments.image, 1)]
        questions = [Question("yours", images, arguments.question, None)]
    else:
        questions = read_questions(assets / IMAGES)
    opened = open_checkpoint(assets / MODEL, None)
    batch = _make_batch(opened, questions)
    opened.check(batch, policy, MAX_NEW_TOKENS)
    keep_programs(not arguments.no_compilation_cache, progress)
    progress.step("loading the weights")
    ready = time.monotonic()
    vlm = opened.load()
    loaded = time.monotonic()

    full = answer(vlm, batch, FullCache(), MAX_NEW_TOKENS, progress)
    compressed = answer(vlm, batch, policy, MAX_NEW_TOKENS, progress)
    progress.close()
    texts = {"full": vlm.processor.decode(full), "vl_cache": vlm.processor.decode(compressed)}
    seconds = {"inputs": ready - start, "load": loaded - ready, "total": time.monotonic() - start}
    if arguments.json:
        results = _describe(questions, batch, full, compressed, texts, seconds)
        emit(json.dumps(results, ensure_ascii=False, indent=2))
    else:
        emit(_page(opened, questions, batch, full, compressed, texts, seconds))
    if picture_path is not None:
        first = questions[0]
        picture = explain(
            first.images,
            batch,
            compressed.kept[0],
            compressed.report,
            vlm.processor.layout,
            question=first.question,
            answer=texts["vl_cache"][0],
        )
        write_picture(picture_path, picture)


def demo_assets(folder: str | None) -> Path:
    """The folder with the demo's checkpoint and images.

    Raises CheckpointError if it has no checkpoint.
    """
    path = Path(str(resources.files("vlcache_jax") / "assets")) if folder is None else Path(folder)
    if not (path / MODEL).is_dir():
        raise CheckpointError(
            f"there is no demo checkpoint in {path / MODEL}: train one with `vlcache-jax train-demo` and give its "
            "folder as --assets, or ask a checkpoint of yours with `vlcache-jax generate --model DIR`"
        )
    return path


def read_questions(folder: Path) -> list[Question]:
    """The questions that `questions.json` lists: [{"images": ["a.png"], "question": ..., "answer": ..., "task": ...}].

    Raises InputError if the file is missing or malformed, or an image cannot be read.
    """
    path = folder / QUESTIONS
    try:
        entries = parse_json(read_plain(path))
        if not isinstance(entries, list) or not entries:
            raise ValueError("it is no list, or an empty one")
        for number, entry in enumerate(entries):
            _check_entry(number, entry)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no list of questions ({error}): restore it from the package") from error
    return [
        Question(
            entry["task"],
            [load_image(folder / name, f"question {number}") for name in entry["images"]],
            entry["question"],
            entry["answer"],
        )
        for number, entry in enumerate(entries)
    ]


def _check_entry(number: int, entry: Any) -> None:
    """Raises ValueError for what is no question."""
    texts = isinstance(entry, dict) and all(isinstance(entry.get(x), str) for x in ("task", "question", "answer"))
    if not texts or not isinstance(entry.get("images"), list) or not entry["images"]:
        raise ValueError(f"question {number} is {shorten(entry)}, without a task, images, a question and an answer")
    for name in entry["images"]:
        if not isinstance(name, str) or not name or name in (".", "..") or any(c in name for c in "/\\\0:"):
            raise ValueError(f"question {number} names the image {shorten(name)}, which is no file beside it")


def _make_batch(opened: OpenedCheckpoint, questions: list[Question]) -> Batch:
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": image} for image in question.images),
                    {"type": "text", "text": question.question},
                ],
            }
        ]
        for question in questions
    ]
    return opened.processor.chat(conversations)


def is_right(text: str, expected: str) -> bool:
    """Whether an answer is the expected one, case and white space apart."""
    return " ".join(text.split()).casefold() == " ".join(expected.split()).casefold()


def _page(
    opened: OpenedCheckpoint,
    questions: list[Question],
    batch: Batch,
    full: Answers,
    compressed: Answers,
    texts: dict[str, list[str]],
    seconds: dict[str, float],
) -> str:
    budget = budget_text(compressed.report.budget)
    spec, device = opened.model.spec, jax.devices()[0]
    many = f"{len(questions)} questions in one batch" if len(questions) > 1 else "1 question"
    blocks = [
        f"VL-Cache demo: {many}, answered with the full KV cache and with {budget} of it\n"
        f"({spec.num_layers} layers, {spec.num_kv_heads} KV heads, {opened.dtype}, on {device.device_kind}, "
        f"{os.cpu_count()} cores)"
    ]
    for row, question in enumerate(questions):
        blocks.append(_question(row, question, batch, texts, budget))
    blocks.append(_kept_table(questions, compressed, budget))
    blocks.append(_cost_table(questions, full, compressed, texts, budget))
    compiling = sum(answers.seconds["compile"] for answers in (full, compressed))
    running = sum(answers.seconds[name] for answers in (full, compressed) for name in ("prefill", "decode"))
    blocks.append(
        f"Total {seconds['total']:.1f} s: reading inputs {seconds['inputs']:.1f}, loading weights "
        f"{seconds['load']:.1f}, compiling or reading\ncompiled programs {compiling:.1f}, running {running:.1f}"
    )
    return "\n\n".join(blocks)


def _question(row: int, question: Question, batch: Batch, texts: dict[str, list[str]], budget: str) -> str:
    images = f"{len(question.images)} image{'s' if len(question.images) != 1 else ''}"
    visual = int(np.sum(np.asarray(batch.vision_index)[row] != TEXT))
    length = int(batch.lengths[row])
    lines = [f"{row + 1}. {question.task} ({images}: {visual} visual tokens of {length})"]
    entries: list[tuple[str, str | None, str | None]] = [
        ("question", question.question, None),
        ("expected", question.expected, None),
    ]
    entries += [("full cache", texts["full"][row], question.expected)]
    entries += [(f"VL-Cache {budget}", texts["vl_cache"][row], question.expected)]
    for name, text, expected in entries:
        if text is None:
            continue
        mark = "" if expected is None else "  [right]" if is_right(text, expected) else "  [wrong]"
        words = " ".join(text.split()) or "(nothing)"
        wrapped = textwrap.wrap(words, WIDTH - 30) or [""]
        if len(wrapped) > 3:
            wrapped = [*wrapped[:2], wrapped[2] + " ..."]
        lines += [f"   {name if i == 0 else '':<17}{line}" for i, line in enumerate(wrapped)]
        lines[-1] += mark
    return "\n".join(lines)


def _kept_table(questions: list[Question], compressed: Answers, budget: str) -> str:
    kept = np.asarray(compressed.report.kept)
    layers = kept.shape[1]
    # Of a deep model, evenly spaced layers: the line must not wrap.
    shown = range(layers) if layers <= 10 else [round(i * (layers - 1) / 9) for i in range(10)]
    header = ["question", "prompt", *(f"L{layer}" for layer in shown), "kept"]
    rows = [
        [
            f"{row + 1}. {question.task}"[:24],
            str(int(compressed.report.prompt_lengths[row])),
            *(str(kept[row, layer]) for layer in shown),
            percent(float(compressed.report.kept_fraction[row])),
        ]
        for row, question in enumerate(questions)
    ]
    return f"Prompt tokens kept per layer (VL-Cache {budget}; the layers share one budget)\n" + table([header, *rows])


def _cost_table(
    questions: list[Question], full: Answers, compressed: Answers, texts: dict[str, list[str]], budget: str
) -> str:
    rows = [["", "full cache", f"VL-Cache {budget}", "ratio"]]
    known = [row for row, question in enumerate(questions) if question.expected is not None]
    if known:
        right = [
            f"{sum(is_right(texts[name][row], questions[row].expected or '') for row in known)} of {len(known)}"
            for name in ("full", "vl_cache")
        ]
        rows.append(["right answers", *right])
    for label, field in (
        ("KV cache of the prompts", "state_bytes"),
        ("room for the answers", "tail_bytes"),
        ("held together", "held_bytes"),
    ):
        a, b = getattr(full.report, field), getattr(compressed.report, field)
        rows.append([label, megabytes(a), megabytes(b), percent(b / a)])
    for name, label in (("prefill", "prefill, seconds"), ("decode", "decoding, seconds")):
        a, b = full.seconds[name], compressed.seconds[name]
        rows.append([label, f"{a:.3f}", f"{b:.3f}", percent(b / a)])
    rows.append(["compiling apart, seconds", *(f"{a.seconds['compile']:.2f}" for a in (full, compressed))])
    return "Cost of the whole batch\n" + table(rows)


def _describe(
    questions: list[Question],
    batch: Batch,
    full: Answers,
    compressed: Answers,
    texts: dict[str, list[str]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    report = compressed.report
    listed = []
    for row, question in enumerate(questions):
        answers = {name: texts[name][row] for name in ("full", "vl_cache")}
        right = None if question.expected is None else {n: is_right(t, question.expected) for n, t in answers.items()}
        listed.append(
            {
                "task": question.task,
                "question": question.question,
                "expected": question.expected,
                "answers": answers,
                "right": right,
                "prompt_tokens": int(batch.lengths[row]),
                "visual_tokens": int(np.sum(np.asarray(batch.vision_index)[row] != TEXT)),
                "kept": np.asarray(report.kept)[row].tolist(),
                "kept_fraction": float(report.kept_fraction[row]),
            }
        )
    runs = {
        name: {
            "state_bytes": answers.report.state_bytes,
            "tail_bytes": answers.report.tail_bytes,
            "held_bytes": answers.report.held_bytes,
            "seconds": {key: round(value, 4) for key, value in answers.seconds.items()},
        }
        for name, answers in (("full", full), ("vl_cache", compressed))
    }
    return {
        "questions": listed,
        "policy": report.policy,
        "budget": report.budget if isinstance(report.budget, float) else budget_text(report.budget),
        "full_bytes": report.full_bytes,
        "runs": runs,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        **describe_runtime(),
    }
