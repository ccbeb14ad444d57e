"""Fine-tunes decoder and projector of a model on questions about images, on one device or a mesh.

    python examples/finetune.py --model llava-hf/llava-1.5-7b-hf --data pages --mesh data=2,fsdp=4 --output run

`pages/questions.json` is a list of {"task": "", "images": ["a.png"], "question": "...", "answer": "..."}, its images
beside it. The run goes on if there is a state in its folder, on whatever mesh; at its end `run/model` is a checkpoint.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import vlcache_jax as vlc
from vlcache_jax.demo.assets import Question, read_questions
from vlcache_jax.training.batch import TrainBatch
from vlcache_jax.training.checkpoint import has_state, load_state, save_state
from vlcache_jax.training.examples import add_answers
from vlcache_jax.training.loop import ProgressLog, prefetch
from vlcache_jax.training.loss import answer_loss
from vlcache_jax.training.parts import merge, split
from vlcache_jax.training.state import init_state, make_train_step


def make_mesh(axes: str | None) -> jax.sharding.Mesh | None:
    """The mesh of "data=2,fsdp=4": rows are split over both, weights over "fsdp" (and over "model", where there is)."""
    if axes is None:
        return None
    sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes))


def make_batch(
    vlm: vlc.VLM, questions: list[Question], number: int, rows: int, length: int, mesh: jax.sharding.Mesh | None
) -> TrainBatch:
    """Batch number `number`: a function of nothing else, so that a resumed run goes on as it would have."""
    chosen = np.random.default_rng([0, number]).integers(0, len(questions), rows)
    conversations = [
        [{"role": "user", "content": [*({"type": "image", "image": image} for image in question.images),
                                      {"type": "text", "text": question.question}]}]
        for question in (questions[i] for i in chosen)
    ]  # fmt: skip
    batch = vlm.processor.chat(conversations, pad_tiles_to=max(len(q.images) for q in questions))
    batch = add_answers(vlm.processor, batch, [questions[i].expected or "" for i in chosen], length)
    if mesh is None:
        return batch
    rows_over = PartitionSpec(tuple(name for name in mesh.axis_names if name != "model"))
    return jax.device_put(batch, NamedSharding(mesh, rows_over))


def train(options: argparse.Namespace) -> float:
    """Runs, or goes on with, a run; the last loss."""
    folder, mesh = Path(options.output), make_mesh(options.mesh)
    questions = read_questions(Path(options.data))
    vlm = vlc.load(options.model, dtype=options.dtype, param_dtype="float32", mesh=mesh, layout="stacked")
    model = dataclasses.replace(vlm.model, remat=options.remat)
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.rate, options.steps // 10 + 1, options.steps + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    tuned, frozen = split(vlm.params, ("decoder", "projector"))
    step = make_train_step(answer_loss(model), optimizer, accumulate=options.accumulate)
    state, done = init_state(tuned, optimizer), {"step": 0, "loss": 0.0}
    if has_state(folder / "state"):
        state, done = load_state(folder / "state", state)
    log = ProgressLog(folder / "log.jsonl")
    numbers = range(int(done["step"]), options.steps)
    for number, batch in zip(
        numbers, prefetch(make_batch(vlm, questions, n, options.rows, options.length, mesh) for n in numbers)
    ):
        state, metrics = step(state, batch, frozen)
        log.count(int(np.sum(batch.batch.lengths)))
        done = {"step": number + 1, "loss": float(metrics["loss"])}
        log.report(**done, rate=float(schedule(number)), exact_match=float(metrics["exact_match"]))
        if done["step"] % options.save_every == 0 or done["step"] == options.steps:
            save_state(folder / "state", state, done, background=done["step"] < options.steps)
    if jax.process_count() == 1:
        vlc.save(dataclasses.replace(vlm, params=merge(frozen, state.params)), folder / "model")
    return done["loss"]


def options_of(
    description: str | None, arguments: list[str] | None, more: dict[str, Any] | None = None, **defaults: Any
) -> argparse.Namespace:
    """What the examples of training are told; `more` options by their names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, or id on the Hugging Face Hub")
    parser.add_argument("--data", required=True, help="folder of questions.json")
    parser.add_argument("--output", required=True, help="folder of the run")
    parser.add_argument("--mesh", help="axes and their sizes: data=2,fsdp=4,model=1")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation; what is trained is float32")
    parser.add_argument("--remat", default="layers", help='what is computed again: "layers", "projections"')
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--accumulate", type=int, default=1, help="parts that a batch is computed in")
    parser.add_argument("--length", type=int, default=1024, help="of a row, in tokens")
    parser.add_argument("--rate", type=float, default=1e-5)
    parser.add_argument("--save-every", type=int, default=50)
    for name, how in (more or {}).items():
        parser.add_argument(name, **how)
    parser.set_defaults(**defaults)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> float:
    return train(options_of(__doc__, arguments))


if __name__ == "__main__":
    main()
