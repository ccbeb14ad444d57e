"""Decode steps per second, against `generate` of transformers on torch's CPU: same weights, prompts and tokens.

Both sides are greedy, in float32, on the same number of threads, and run every step (no end-of-sequence). A step's time
is that of all steps after the prefill, divided by their number: here the compiled decoding loop of `vlc.generate`,
there from the end of the first forward pass to the end of `generate`. Rounds alternate between the sides.

    python benchmarks/decode_speed.py --shape demo --batch 8 --length 290
    python benchmarks/decode_speed.py --shape 300m --batch 1 --length 2048 --repeats 3
    python benchmarks/decode_speed.py --model CHECKPOINT --batch 8 --length 290
"""

import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

import vlcache_jax as vlc
from vlcache_jax.models.decoder.layout import LAYOUTS, relaid
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.llava.weights import WEIGHTS
from vlcache_jax.models.families.registry import read_config
from vlcache_jax.models.io.params_reader import load_params


def ours(model: Llava, params: Any, batch: vlc.Batch, policy: vlc.Policy, steps: int) -> Callable[[], np.ndarray]:
    """A function that decodes `steps` tokens after the prompts' first one: the program that `vlc.generate` runs."""
    logits, state = jax.block_until_ready(vlc.prefill(model, params, batch, policy).start(steps + 1))
    return lambda: jax.block_until_ready(vlc.decode(model, params, logits, state, steps + 1, eos_token_ids=())[0])


def theirs(model: Any, batch: vlc.Batch, steps: int) -> Callable[[], tuple[float, np.ndarray]]:
    """A function that generates and returns (seconds after the prefill, tokens)."""
    import torch

    inputs = harness.torch_inputs(batch)
    ends: list[float] = []
    model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))

    def run() -> tuple[float, np.ndarray]:
        ends.clear()
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=steps + 1)
        seconds = time.perf_counter() - ends[0]
        assert len(ends) == steps + 1
        return seconds, out[:, -steps - 1 :].numpy()

    return run


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shape", choices=harness.SHAPES, default="demo", help="a model with random weights")
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint instead")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=290, help="tokens of every prompt, visual ones included")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--layout", choices=(*LAYOUTS, "both"), default="both", help="of the parameters")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    config = harness.SHAPES[args.shape] if args.model is None else read_config(args.model)
    model = Llava(config)
    if args.model is None:
        params = harness.random_params(model)
    else:
        params = load_params(args.model, model.abstract_params(), WEIGHTS, jnp.float32)
    batch = harness.random_batch(config, args.batch, args.length)
    reference = theirs(harness.in_transformers(config, params, args.threads), batch, args.steps)
    layouts = LAYOUTS if args.layout == "both" else [args.layout]

    tokens: dict[str, np.ndarray] = {}

    def run_reference() -> float:
        seconds, tokens["transformers"] = reference()
        return seconds

    sides = {"transformers": run_reference}
    described = {}
    for layout in layouts:
        laid, weights = relaid(params, model, layout)
        jax.block_until_ready(weights)
        for policy in (vlc.FullCache(), vlc.VLCache(budget=args.budget)):
            name = f"{policy.name} {policy.budget:g}, {layout}"
            decode = ours(laid, weights, batch, policy, args.steps)
            tokens[name] = np.asarray(decode())
            sides[name] = lambda decode=decode: harness.timed(decode)
            described[name] = {"policy": policy.name, "budget": policy.budget, "layout": layout}
    timings = harness.alternate(sides, args.repeats)

    base = timings["transformers"]
    rows, lines = [], [["transformers", harness.spread(base.record(), 1e3 / args.steps), "1", ""]]
    for name, what in described.items():
        speed_up = harness.ratio(base, timings[name])
        same = float(np.mean(tokens[name] == tokens["transformers"]))
        rows.append({
            **what, "seconds": timings[name].record(), "seconds_transformers": base.record(), "speed_up": speed_up,
            "same_tokens": same,
        })  # fmt: skip
        step = harness.spread(timings[name].record(), 1e3 / args.steps)
        lines.append([name, step, harness.spread(speed_up), f"{same:.0%}"])
    harness.table(["", "ms per step", "x transformers", "same tokens"], lines)
    settings = {
        "model": "checkpoint" if args.model else args.shape, "parameters": harness.count_params(params),
        "batch": args.batch, "length": args.length, "steps": args.steps, "threads": args.threads,
        "repeats": args.repeats,
    }  # fmt: skip
    harness.finish("decode_speed", settings, rows, args.json)


if __name__ == "__main__":
    main()
