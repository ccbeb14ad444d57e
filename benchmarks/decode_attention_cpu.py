"""Decode attention in plain XLA: does its time follow the kept tokens, and what does it cost beyond dense attention?

Sides: every token of a store; a tenth of them, in segments that start anywhere in the same store; the same tenth in a
store of its own size; and dense attention (two products and a softmax) on arrays that hold exactly those tokens.

    python benchmarks/decode_attention_cpu.py --model llava-v1.6-mistral-7b --batch 4 --tokens 16384 --share 0.1
"""

from collections.abc import Callable

import harness
import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.kernels.decode_attention import decode_attention
from vlcache_jax.kernels.shapes import SHAPES, Shape

ALIGNMENT = 16


@jax.jit
def dense(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """[batch, heads, d] over [batch, kv_heads, tokens, d], nothing masked."""
    batch, _, head_dim = query.shape
    q = query.reshape(batch, keys.shape[1], -1, head_dim)
    logits = jnp.einsum("bkgd,bktd->bkgt", q, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgt,bktd->bkgd", weights, values, preferred_element_type=jnp.float32)
    return out.reshape(query.shape)


def ours(query: jax.Array, keys: jax.Array, values: jax.Array, tokens: int, seed: int) -> Callable[[], jax.Array]:
    """Calls the op on `tokens` tokens of every (row, KV head)."""
    batch, lanes, slots, _ = keys.shape
    first = np.random.default_rng(seed).integers(0, (slots - tokens) // ALIGNMENT + 1, (batch, lanes)) * ALIGNMENT
    offsets, lengths = jnp.asarray(first, jnp.int32), jnp.full((batch, lanes), tokens, jnp.int32)
    op = jax.jit(lambda *x: decode_attention(*x, implementation="xla")[0])
    return lambda: op(query, keys, values, offsets, lengths)


def random_store(shape: Shape, batch: int, slots: int, dtype: str, seed: int) -> jax.Array:
    """[batch, kv_heads, slots, head_dim]."""
    size = (batch, shape.kv_heads, slots, shape.head_dim)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(size, dtype=np.float32), dtype)


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", choices=SHAPES, default="llava-v1.6-mistral-7b", help="whose heads")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16384, help="of the store")
    parser.add_argument("--share", type=float, default=0.1, help="of them that are kept")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--calls", type=int, default=4, help="in a round")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    shape = SHAPES[args.model]
    kept = int(args.tokens * args.share)
    size = (args.batch, shape.heads, shape.head_dim)
    query = jnp.asarray(np.random.default_rng(0).standard_normal(size, dtype=np.float32), args.dtype)
    large = [random_store(shape, args.batch, args.tokens, args.dtype, seed) for seed in (1, 2)]
    small = [x[:, :, : -(-kept // ALIGNMENT) * ALIGNMENT] for x in large]
    exact = [x[:, :, :kept] for x in large]
    calls = {
        "all tokens": ours(query, *large, args.tokens, 3),
        "kept tokens": ours(query, *large, kept, 3),
        "kept tokens, own store": ours(query, *small, kept, 3),
        "dense on the kept tokens": lambda: dense(query, *exact),
    }
    difference = float(jnp.max(jnp.abs(calls["kept tokens, own store"]() - calls["dense on the kept tokens"]())))

    def side(call: Callable[[], jax.Array]) -> Callable[[], float]:
        return lambda: harness.timed(lambda: [call() for _ in range(args.calls)]) / args.calls

    timings = harness.alternate({name: side(call) for name, call in calls.items()}, args.repeats)
    rows, lines = [], []
    for name, timing in timings.items():
        to_all = harness.ratio(timing, timings["all tokens"])
        to_dense = harness.ratio(timing, timings["dense on the kept tokens"])
        rows.append({"name": name, "seconds": timing.record(), "to_all": to_all, "to_dense": to_dense})
        lines.append([name, harness.spread(timing.record(), 1e3), harness.spread(to_all), harness.spread(to_dense)])
    harness.table(["decode attention", "ms", "x all tokens", "x dense"], lines)
    settings = {
        "model": args.model, "batch": args.batch, "tokens": args.tokens, "kept": kept, "dtype": args.dtype,
        "repeats": args.repeats, "calls": args.calls, "difference": difference,
    }  # fmt: skip
    harness.finish("decode_attention_cpu", settings, rows, args.json)


if __name__ == "__main__":
    main()
