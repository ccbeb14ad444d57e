"""GRPO with rollouts from a compressed cache: the demo model, its weights disturbed, learns to read pages again.

    python examples/rollouts.py --budget 0.1 --output run --steps 60
    python examples/rollouts.py --budget 0.1 --no-correction --output other

Eight answers to a prompt are drawn from one prefill that keeps a share of the cache; a right one gives a reward of 1.
The gradient is of the full cache's probabilities; importance weights make up for the difference. A run that is started
again goes on from its last state, and `log.jsonl` in its folder has a line for each step.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from PIL import Image

import vlcache_jax as vlc
from vlcache_jax.demo.assets import MODEL, demo_assets
from vlcache_jax.demo.data.samples import HELD_OUT_SEED, make_sample
from vlcache_jax.demo.data.tokenizer import prompt
from vlcache_jax.training.checkpoint import has_state, load_state, save_state
from vlcache_jax.training.loop import ProgressLog
from vlcache_jax.training.parts import merge, split
from vlcache_jax.training.rollouts import Group, advantages, grpo_loss, rollout
from vlcache_jax.training.state import init_state, make_train_step

NEW_TOKENS = 10  # "postcode 8807" and its end take seven


def pages(vlm: vlc.VLM, seed: int, number: int, rows: int) -> tuple[vlc.Batch, list[str]]:
    """Prompts that ask for a value on a page, and the right answers."""
    samples = [make_sample("documents", seed, number * rows + row) for row in range(rows)]
    questions, answers = zip(*(sample.questions[0] for sample in samples))
    images = [[Image.fromarray(image) for image in sample.images] for sample in samples]
    batch = vlm.processor(images=images, text=[prompt(question) for question in questions])
    return batch, list(answers)


def rewards(vlm: vlc.VLM, out: Any, answers: list[str]) -> np.ndarray:
    """1 for each answer [prompts, samples] that is right."""
    texts = vlm.processor.decode(out)
    return np.array([[text.strip() == right for text in row] for row, right in zip(texts, answers)], np.float32)


def disturbed(params: Any, amount: float) -> Any:
    """Noise on the decoder's kernels, `amount` times their own standard deviation."""
    rng = np.random.default_rng(0)

    def disturb(path: Any, x: jax.Array) -> jax.Array:
        noise = amount * np.std(x) * rng.normal(size=x.shape) if path[-1].key == "kernel" else 0
        return (x + noise).astype(x.dtype)

    layers = jax.tree_util.tree_map_with_path(disturb, params["decoder"]["layers"])
    return params | {"decoder": params["decoder"] | {"layers": layers}}


def accuracy(vlm: vlc.VLM, params: Any, policy: Any, rows: int) -> float:
    """Share of held-out pages that are read right by greedy decoding."""
    right = []
    for number in range(-(-rows // 16)):
        batch, answers = pages(vlm, HELD_OUT_SEED, number, 16)
        out = vlc.generate(vlm.model, params, batch, policy, NEW_TOKENS)
        right += [text.strip() == answer for text, answer in zip(vlm.processor.decode(out), answers)]
    return float(np.mean(right[:rows]))


def train(options: argparse.Namespace) -> float:
    """Runs, or goes on with, a run; the reward at its end."""
    folder = Path(options.output)
    vlm = vlc.load(demo_assets(options.assets) / MODEL, dtype="float32", layout="stacked")
    policy = vlc.FullCache() if options.budget >= 1 else vlc.VLCache(budget=options.budget)
    start = disturbed(vlm.params, options.disturb)
    tuned, frozen = split(start, ("decoder/layers",))
    schedule = optax.warmup_constant_schedule(0.0, options.rate, 5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))
    step = make_train_step(grpo_loss(vlm.model, correction=2.0 if options.correction else None), optimizer)
    state, done = init_state(tuned, optimizer), {"step": 0, "reward": 0.0}
    if has_state(folder / "state"):
        state, done = load_state(folder / "state", state)
    log = ProgressLog(folder / "log.jsonl")

    def evaluate() -> None:
        params = merge(frozen, state.params)
        under = {"full": vlc.FullCache(), "kept": policy}
        found = {f"accuracy_{name}": accuracy(vlm, params, of, options.held_out) for name, of in under.items()}
        log.report(step=done["step"], **found)

    if done["step"] == 0 and options.held_out:
        evaluate()
    while done["step"] < options.steps:
        number = done["step"]
        batch, answers = pages(vlm, 0, number, options.prompts)
        params = merge(frozen, state.params)
        out = rollout(
            vlm.model, params, batch, policy, NEW_TOKENS, samples=options.samples,
            sampling=vlc.Sampling(temperature=options.temperature), seeds=1000 * number, full=True,
        )  # fmt: skip
        reward = rewards(vlm, out, answers)
        state, metrics = step(state, Group(batch, out, advantages(reward)), frozen)
        done = {"step": number + 1, "reward": float(reward.mean())}
        log.report(**done, **{name: float(x) for name, x in metrics.items()})
        if done["step"] % options.save_every == 0 or done["step"] == options.steps:
            save_state(folder / "state", state, done, background=done["step"] < options.steps)
            if options.held_out:
                evaluate()
    return done["reward"]


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder of the run")
    parser.add_argument("--assets", help="folder with a demo checkpoint of your own (vlcache-jax train-demo)")
    parser.add_argument(
        "--budget", type=float, default=0.1, help="share of the cache that answers are drawn with; 1: all"
    )
    parser.add_argument("--correction", action=argparse.BooleanOptionalAction, default=True, help="importance weights")
    parser.add_argument("--disturb", type=float, default=0.7, help="how much noise the weights start with")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=8, help="in a step")
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--held-out", type=int, default=48, help="pages of each evaluation; 0 for none")
    parser.add_argument("--save-every", type=int, default=20)
    return train(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
