"""Several samples of a prompt from one compressed prefill, beside as many separate generations; log-probabilities, too.

    python benchmarks/rollouts.py --shape 300m --budget 0.1

Both sides draw the same numbers of tokens in full; "with both log-probabilities" is `rollout(full=True)`, whose scoring
passes the other two sides do not have.
"""

import argparse

import harness
import jax
import jax.numpy as jnp

import vlcache_jax as vlc
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.training.rollouts import rollout


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shape", choices=harness.SHAPES, default="300m")
    parser.add_argument("--layout", choices=("stacked", "apart"), default="apart")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action=argparse.BooleanOptionalAction, default=True, help="the third side")
    args = parser.parse_args()
    model = Llava(harness.SHAPES[args.shape], jnp.dtype("float32"), layout=args.layout)
    params = harness.random_params(model)
    batch = harness.random_batch(model.config, 1, args.length)
    policy, sampling = vlc.VLCache(budget=args.budget), vlc.Sampling()

    def separate(samples: int = args.samples) -> float:
        def one(seed: int) -> jax.Array:
            options = {"sampling": sampling, "seeds": seed, "eos_token_ids": []}
            return vlc.generate(model, params, batch, policy, args.steps, **options).tokens

        return harness.timed(lambda: [one(seed) for seed in range(samples)])

    def forked() -> float:
        def run() -> jax.Array:
            ctx = vlc.compress(model, params, batch, policy)
            return vlc.answer(
                ctx, max_new_tokens=args.steps, samples=args.samples, sampling=sampling, eos_token_ids=[]
            ).tokens

        return harness.timed(run)

    def scored() -> float:
        options = {"samples": args.samples, "full": True, "eos_token_ids": []}
        return harness.timed(lambda: rollout(model, params, batch, policy, args.steps, **options).full)

    sides = {"separate": separate, "one prefill": forked, "with both log-probabilities": scored}
    if not args.full:
        del sides["with both log-probabilities"]
    for compiled in (lambda: separate(1), *list(sides.values())[1:]):
        compiled()
    timings = harness.alternate(sides, args.repeats, warm=False)
    tokens = args.samples * args.steps
    rows = [
        {"side": name, "seconds": timing.record(), "tokens_per_second": tokens / timing.median,
         "speed_up": harness.ratio(timings["separate"], timing)}
        for name, timing in timings.items()
    ]  # fmt: skip
    lines = [
        [
            row["side"],
            harness.spread(row["seconds"]),
            f"{row['tokens_per_second']:.0f}",
            harness.spread(row["speed_up"]),
        ]
        for row in rows
    ]
    harness.table(["", "seconds", "tokens/s", "speed-up"], lines)
    settings = {**vars(args), "json": None, "parameters": harness.count_params(params)}
    harness.finish("rollouts", settings, rows, args.json)


if __name__ == "__main__":
    main()
