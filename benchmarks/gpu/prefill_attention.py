"""Prefill attention: time, share of the arithmetic peak, memory and error of each implementation.

    python benchmarks/gpu/prefill_attention.py --lengths 2048 8192 32768 --peak 989 --json prefill_attention.json

`ragged` runs give cuDNN the true lengths (three quarters of the padded one).
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import harness
from column_statistics import draw, repeated

from vlcache_jax.kernels.attention import attention


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10, help="calls inside one program")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", type=float, help="of the card in bfloat16, TFLOP/s (989 for H100 and H200)")
    parser.add_argument("--implementations", nargs="+", default=["cudnn", "xla_wide"])
    args = parser.parse_args()

    records, lines = [], []
    for length in args.lengths:
        heads = (args.heads, args.kv_heads, args.kv_heads)
        arrays = [draw(i, args.batch, length, h, args.head_dim) for i, h in enumerate(heads)]
        true = jnp.full((args.batch,), max(1, 3 * length // 4), jnp.int32)
        wanted = jax.jit(functools.partial(attention, implementation="xla"))(*arrays)[0]
        wanted = np.asarray(wanted, np.float32)
        sides, programs, errors = {}, {}, {}
        for name in args.implementations:
            for ragged in (False, True) if name == "cudnn" else (False,):
                lengths = true if ragged else None
                run = functools.partial(attention, lengths=lengths, with_lse=False, implementation=name)
                label = f"{name}, ragged" if ragged else name
                try:
                    out = np.asarray(jax.jit(run)(*arrays)[0], np.float32)
                except NotImplementedError as reason:
                    print(f"{label} at {length}: {reason}", file=sys.stderr)
                    continue
                if not np.isfinite(out).all():
                    raise SystemExit(f"{label} at {length}: the output is not finite")
                difference = np.abs(out - wanted)[:, : int(true[0]) if ragged else length]
                errors[label] = {"p99": float(np.quantile(difference, 0.99)), "max": float(difference.max())}
                program = repeated(run, args.rounds)
                programs[label] = program
                sides[label] = lambda program=program, x=arrays: harness.timed(lambda: program(*x)) / args.rounds
        timings = harness.alternate(sides, args.repeats)
        work = 4 * args.batch * args.heads * args.head_dim * length * (length + 1) / 2
        for label, timing in timings.items():
            speed = work / timing.median / 1e12
            memory = programs[label].lower(*arrays).compile().memory_analysis().temp_size_in_bytes
            record = {
                "length": length, "name": label, "seconds": timing.record(), "causal_tflops": speed,
                "share_of_peak": speed / args.peak if args.peak else None, "temporary_bytes": memory,
                "difference_from_xla": errors[label],
            }  # fmt: skip
            records.append(record)
            share = "" if record["share_of_peak"] is None else f"{record['share_of_peak']:.1%}"
            lines.append(
                [str(length), label, harness.spread(timing.record(), 1e3, 3), f"{speed:.1f}", share,
                 f"{memory / 2**20:.0f}", f"{errors[label]['p99']:.1e} / {errors[label]['max']:.1e}"]
            )  # fmt: skip
    header = ["length", "implementation", "ms", "TFLOP/s", "of peak", "temporary MiB", "difference p99 / max"]
    harness.table(header, lines)
    harness.finish("prefill_attention", {k: v for k, v in vars(args).items() if k != "json"}, records, args.json)


if __name__ == "__main__":
    main()
