"""What compression adds to the prefill: VL-Cache against the full cache, and where the difference comes from.

The steps between the two: random eviction selects and packs but measures nothing; VL-Cache also measures the attention
of its scoring rows (`--scored` of them, after the image).

    python benchmarks/prefill_overhead.py --shape 300m --length 2048
"""

import harness

import vlcache_jax as vlc
from vlcache_jax.models.families.llava.model import Llava


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shape", choices=harness.SHAPES, default="300m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--scored", type=int, default=64, help="text tokens after the image, the rows that score")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    config = harness.SHAPES[args.shape]
    model = Llava(config)
    params = harness.random_params(model)
    batch = harness.random_batch(config, args.batch, args.length, question=args.scored)
    policies = {
        "full cache": vlc.FullCache(),
        "select and pack (random eviction)": vlc.RandomEviction(budget=args.budget),
        "VL-Cache, candidates 0.4": vlc.VLCache(budget=args.budget, candidate_fraction=max(0.4, args.budget)),
        "VL-Cache": vlc.VLCache(budget=args.budget),
    }
    sides = {
        name: lambda policy=policy: harness.timed(lambda: vlc.prefill(model, params, batch, policy).start(16))
        for name, policy in policies.items()
    }
    timings = harness.alternate(sides, args.repeats)
    rows, lines = [], []
    for name, timing in timings.items():
        overhead = harness.ratio(timing, timings["full cache"])
        rows.append({"policy": name, "seconds": timing.record(), "ratio": overhead})
        lines.append([name, harness.spread(timing.record(), digits=3), harness.spread(overhead, digits=3)])
    harness.table(["prefill", "seconds", "x full cache"], lines)
    settings = {
        "model": args.shape, "parameters": harness.count_params(params), "batch": args.batch, "length": args.length,
        "scored": args.scored, "budget": args.budget, "repeats": args.repeats,
    }  # fmt: skip
    harness.finish("prefill_overhead", settings, rows, args.json)


if __name__ == "__main__":
    main()
