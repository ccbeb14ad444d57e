"""Fine-tunes adapters (LoRA) of a model on questions about images, and writes them in PEFT's format.

    python examples/lora.py --model llava-hf/llava-1.5-7b-hf --data pages --mesh data=4,model=2 --output run
    python examples/lora.py --model llava-hf/llava-1.5-7b-hf --data pages --adapters run/adapters --output more

The data are those of finetune.py. Weights stay in bfloat16, split over the mesh; the state holds the adapters alone.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import optax
from finetune import make_batch, make_mesh, options_of

import vlcache_jax as vlc
from vlcache_jax.demo.assets import read_questions
from vlcache_jax.training.adapter_folder import load_adapters, save_adapters
from vlcache_jax.training.checkpoint import has_state, load_state, save_state
from vlcache_jax.training.loop import ProgressLog, prefetch
from vlcache_jax.training.lora import Lora
from vlcache_jax.training.loss import answer_loss
from vlcache_jax.training.state import init_state, make_train_step


def train(options: argparse.Namespace) -> float:
    """Runs, or goes on with, a run; the last loss."""
    folder, mesh = Path(options.output), make_mesh(options.mesh)
    questions = read_questions(Path(options.data))
    vlm = vlc.load(options.model, dtype=options.dtype, mesh=mesh, layout="stacked")
    model = dataclasses.replace(vlm.model, remat=options.remat)
    if options.adapters is None:
        lora = Lora(rank=options.rank, alpha=2 * options.rank, dropout=options.dropout)
        adapters = lora.init(model, vlm.params)
    else:
        lora, adapters = load_adapters(options.adapters, vlm)
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.rate, options.steps // 10 + 1, options.steps + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    step = make_train_step(lora.loss(answer_loss(model)), optimizer, accumulate=options.accumulate, seed=0)
    state, done = init_state(adapters, optimizer), {"step": 0, "loss": 0.0}
    if has_state(folder / "state"):
        state, done = load_state(folder / "state", state)
    log = ProgressLog(folder / "log.jsonl")
    numbers = range(int(done["step"]), options.steps)
    for number, batch in zip(
        numbers, prefetch(make_batch(vlm, questions, n, options.rows, options.length, mesh) for n in numbers)
    ):
        state, metrics = step(state, batch, vlm.params)
        done = {"step": number + 1, "loss": float(metrics["loss"])}
        log.report(**done, rate=float(schedule(number)), exact_match=float(metrics["exact_match"]))
        if done["step"] % options.save_every == 0 or done["step"] == options.steps:
            save_state(folder / "state", state, done, background=done["step"] < options.steps)
    save_adapters(folder / "adapters", lora, state.params, vlm, base=str(options.model))
    return done["loss"]


def main(arguments: list[str] | None = None) -> float:
    more: dict[str, Any] = {
        "--rank": {"type": int, "default": 16},
        "--dropout": {"type": float, "default": 0.0, "help": "of what goes into the adapters"},
        "--adapters": {"help": "folder of adapters to go on from"},
    }
    return train(options_of(__doc__, arguments, more, rate=1e-4))


if __name__ == "__main__":
    main()
