"""Decode attention on a GPU: the bandwidth it reaches, beside that of a copy measured in the same run.

    python benchmarks/gpu/decode_attention.py --json decode_attention.json

Heads of llava-v1.6-mistral-7b: 32 rows with 4096 kept tokens each, where bandwidth counts, and one row with 1024,
where latency does. Each time is that of one of many rounds in one program, so that no launch or transfer from the host
counts. An implementation that cannot serve a shape or the GPU is reported with its reason.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import harness

from vlcache_jax.kernels.decode_attention import decode_attention
from vlcache_jax.kernels.shapes import SHAPES


def repeated(function: Callable[..., tuple[jax.Array, jax.Array]], rounds: int) -> Callable[..., jax.Array]:
    """One program of so many calls, each with the query that the one before gave."""

    @jax.jit
    def run(query: jax.Array, *rest: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, rounds, lambda _, q: function(q, *rest)[0].astype(query.dtype), query)

    return run


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), default="llava-v1.6-mistral-7b")
    parser.add_argument("--shapes", nargs="+", default=["32x4096", "1x1024"], help="batch x kept tokens")
    parser.add_argument("--implementations", nargs="+", default=["pallas_gpu", "xla_wide", "xla"])
    parser.add_argument("--copy-bytes", type=int, default=1 << 30)
    parser.add_argument("--rounds", type=int, default=100, help="calls inside one program")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    heads, kv_heads, head_dim = SHAPES[args.model]

    block = jnp.zeros(args.copy_bytes // 2, jnp.bfloat16)
    copy = harness.repeated_copy(args.rounds)
    sides = {"copy": lambda: harness.timed(lambda: copy(block)) / args.rounds}
    moved, failures, errors = {"copy": 2 * block.nbytes}, {}, {}
    for size in args.shapes:
        batch, kept = (int(n) for n in size.split("x"))
        keys = jax.random.split(jax.random.key(0), 3)
        query = jax.random.normal(keys[0], (batch, heads, head_dim), jnp.bfloat16)
        store = [jax.random.normal(k, (batch, kv_heads, kept, head_dim), jnp.bfloat16) for k in keys[1:]]
        offsets = jnp.zeros((batch, kv_heads), jnp.int32)
        arguments = (query, *store, offsets, jnp.full_like(offsets, kept))
        wanted = jax.jit(functools.partial(decode_attention, implementation="xla"))(*arguments)[0]
        for name in args.implementations:
            side = f"{size} {name}"
            function = functools.partial(decode_attention, implementation=name)
            try:
                found = jax.jit(function)(*arguments)[0]
                program = repeated(function, args.rounds)
                jax.block_until_ready(program(*arguments))
            except Exception as error:  # the reason is the result
                failures[side] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                continue
            errors[side] = float(np.abs(np.asarray(found) - np.asarray(wanted)).max())
            sides[side] = lambda program=program, a=arguments: harness.timed(lambda: program(*a)) / args.rounds
            moved[side] = sum(x.nbytes for x in store)

    timings = harness.alternate(sides, args.repeats)
    records = harness.beside_copy(timings, moved, "us")
    for record in records:
        record["largest_difference_from_xla"] = errors.get(record["name"])
    for name, reason in failures.items():
        print(f"{name}: {reason}")
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    harness.finish("decode_attention", {**settings, "failures": failures}, records, args.json)


if __name__ == "__main__":
    main()
