"""What the scoring rows of a prompt cost beside the layer's own prefill: attention and matrix products.

    python benchmarks/gpu/column_statistics.py --json column_statistics.json

One layer of llava-v1.6-mistral-7b by default, 50 rows on 32k keys. Each time is that of one of many rounds in one
program, so that no launch or transfer from the host counts.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import harness

from vlcache_jax.kernels.attention import attention
from vlcache_jax.kernels.column_statistics import column_statistics


def repeated(function, rounds):
    """One program that calls `function(*args)` so many times.

    Each call changes one number of the next one's first argument, in place, by its results: otherwise the compiler sees
    that all calls are the same and makes one.
    """

    @jax.jit
    def run(*args):
        def body(_, args):
            largest = [jnp.max(x.astype(jnp.float32)) for x in jax.tree.leaves(function(*args))]
            change = 1e-3 * sum(jnp.clip(x, -1, 1) for x in largest)
            at = (0,) * args[0].ndim
            return (args[0].at[at].add(change.astype(args[0].dtype)), *args[1:])

        return jax.lax.fori_loop(0, rounds, body, args)[0]

    return run


def draw(seed, *shape, scale=1.0, dtype=jnp.bfloat16):
    return scale * jax.random.normal(jax.random.key(seed), shape, dtype)


def error(actual, wanted):
    """Largest difference, as a share of the largest value."""
    actual, wanted = (np.asarray(x, np.float64) for x in (actual, wanted))
    finite = np.isfinite(wanted)
    return float(np.abs(actual - wanted)[finite].max() / np.abs(wanted[finite]).max())


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--rounds", type=int, default=20, help="calls inside one program")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--implementations", nargs="+", default=["xla_columns", "xla"])
    args = parser.parse_args()

    batch, length, heads, kv_heads, head_dim = args.batch, args.length, args.heads, args.kv_heads, args.head_dim
    query, key, value = (draw(i, batch, length, h, head_dim) for i, h in enumerate((heads, kv_heads, kv_heads)))
    first = jnp.full((batch,), length - args.rows, jnp.int32)
    count = jnp.full((batch,), args.rows, jnp.int32)
    hidden = draw(3, batch, length, args.hidden)
    width = heads * head_dim
    sizes = [(args.hidden, width + 2 * kv_heads * head_dim), (width, args.hidden), (args.hidden, args.intermediate)]
    sizes += [(args.hidden, args.intermediate), (args.intermediate, args.hidden)]
    weights = [draw(10 + i, *size, scale=0.02) for i, size in enumerate(sizes)]

    def products(hidden, mixed, qkv, output, gate, up, down):
        return hidden @ qkv, mixed @ output, (jax.nn.silu(hidden @ gate) * (hidden @ up)) @ down

    attend = functools.partial(attention, with_lse=False, implementation=("cudnn", "xla_wide"))
    functions = {
        "attention": (attend, (query, key, value)),
        "matrix products": (products, (hidden, query.reshape(batch, length, width), *weights)),
    }
    plain = column_statistics(query, key, first, count, max_rows=args.rows, implementation="xla")
    rows = jnp.arange(length)

    def everywhere(x):  # [batch, rows, heads] of the slice -> [batch, length, heads]
        at = jnp.clip(rows - (length - args.rows), 0, args.rows - 1)
        return jnp.where((rows >= length - args.rows)[:, None], x[:, at], 0)

    lse, maximum = everywhere(plain.lse), everywhere(plain.maximum)
    errors = {}
    for name in args.implementations:
        run = functools.partial(column_statistics, max_rows=args.rows, implementation=name)
        found = jax.jit(run)(query, key, first, count)
        errors[name] = {n: error(getattr(found, n), getattr(plain, n)) for n in ("sums", "counts", "lse", "maximum")}
        functions[f"statistics: {name}"] = (run, (query, key, first, count))
        functions[f"statistics: {name}, log-sum-exp and maximum given"] = (
            lambda q, k, f, c, lse, maximum, run=run: run(q, k, f, c, lse=lse, maximum=maximum),
            (query, key, first, count, lse, maximum),
        )

    sides = {}
    for name, (function, arrays) in functions.items():
        program = repeated(function, args.rounds)
        sides[name] = lambda program=program, arrays=arrays: harness.timed(lambda: program(*arrays)) / args.rounds
    timings = harness.alternate(sides, args.repeats)
    layer = timings["attention"].median + timings["matrix products"].median
    records, lines = [], []
    for name, timing in timings.items():
        share = timing.median / layer
        records.append({"name": name, "seconds": timing.record(), "share": share})
        lines.append([name, harness.spread(timing.record(), 1e3, 3), f"{share:.2%}"])
    harness.table(["", "ms", "share of the layer"], lines)
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    harness.finish("column_statistics", {**settings, "errors": errors}, records, args.json)


if __name__ == "__main__":
    main()
