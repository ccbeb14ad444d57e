"""The GPU's implementations beside the definition in float64 on the host; exit status 1 if one is wrong.

    python benchmarks/gpu/correctness.py

Random lengths, segments that begin at any slot, slots that hold NaN where nothing may look, and the head sizes of the
supported models. An implementation that cannot serve a case or the GPU is reported with its reason.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import harness

from vlcache_jax.kernels.attention import Mask, attention
from vlcache_jax.kernels.column_statistics import column_statistics
from vlcache_jax.kernels.decode_attention import decode_attention

# batch, queries, heads, KV heads, lanes, slots, head size
DECODE = [
    "3,1,32,8,8,1024,128",
    "2,1,24,24,24,200,64",
    "2,1,32,8,1,8192,128",
    "2,3,28,4,4,2048,128",
    "2,1,16,4,4,512,256",
]
# batch, length, heads, KV heads, head size, "causal", "full" or a window
PREFILL = [
    "2,777,32,8,128,causal",
    "1,577,16,16,64,full",
    "2,640,8,4,256,100",
    "1,729,16,16,72,full",
    "1,1024,16,16,80,full",
]
MOST = {
    "bfloat16": 5e-3,
    "float32": 1e-3,
}  # norm of the difference over that of the result; float32 takes TF32 products


def difference(found: jax.Array, wanted: np.ndarray) -> float:
    """Norm of the difference over that of what is wanted, where that is finite; infinite where NaN is found."""
    finite = np.isfinite(wanted)
    found, wanted = np.asarray(found, np.float64)[finite], wanted[finite]
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)) if np.isfinite(found).all() else np.inf


def decode_case(
    case: str, dtype: str
) -> tuple[Callable[..., tuple[jax.Array, ...]], list[jax.Array], list[np.ndarray]]:
    """Function, arguments and what is wanted of it."""
    batch, n, heads, kv_heads, lanes, slots, head_dim = map(int, case.split(","))
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s) for s in ((batch, n, heads, head_dim), *[(batch, lanes, slots, head_dim)] * 2))
    share = slots // (kv_heads // lanes)  # of a lane, for each of its heads
    lengths = rng.integers(n, share - 8, (batch, kv_heads))
    offsets = rng.integers(0, 8, (batch, kv_heads)) + np.arange(kv_heads) % (kv_heads // lanes) * share
    arguments = [jnp.asarray(x, dtype) for x in (q, k, v)]
    q, k, v = (np.asarray(x, np.float64) for x in arguments)
    used = np.zeros((batch, lanes, slots), bool)
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    for row, i, head in itertools.product(range(batch), range(n), range(heads)):
        kv = head * kv_heads // heads
        lane, first, end = kv * lanes // kv_heads, offsets[row, kv], offsets[row, kv] + lengths[row, kv]
        used[row, lane, first:end] = True
        end -= n - 1 - i
        logits = k[row, lane, first:end] @ q[row, i, head] * head_dim**-0.5
        lse[row, i, head] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        out[row, i, head] = np.exp(logits - lse[row, i, head]) @ v[row, lane, first:end]
    arguments[1:] = [jnp.where(used[..., None], x, jnp.asarray(jnp.nan, dtype)) for x in arguments[1:]]
    arguments += [jnp.asarray(x, jnp.int32) for x in (offsets, lengths)]
    return functools.partial(decode_attention, causal=True), arguments, [out, lse]


def prefill_case(
    case: str, dtype: str
) -> tuple[Callable[..., tuple[jax.Array, ...]], list[jax.Array], list[np.ndarray]]:
    """As `decode_case`."""
    *sizes, kind = case.split(",")
    batch, length, heads, kv_heads, head_dim = map(int, sizes)
    mask = Mask(causal=kind != "full", window=int(kind) if kind.isdigit() else None)
    rng = np.random.default_rng(0)
    arguments = [
        jnp.asarray(rng.standard_normal((batch, length, h, head_dim)), dtype) for h in (heads, kv_heads, kv_heads)
    ]
    q, k, v = (np.asarray(x, np.float64) for x in arguments)
    k, v = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) * head_dim**-0.5
    row, column = np.arange(length)[:, None], np.arange(length)[None]
    seen = (column <= row) | (not mask.causal)
    seen &= row - column < (mask.window or length)
    weights = np.where(seen, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    out = np.einsum("bhts,bshd->bthd", weights / weights.sum(axis=-1, keepdims=True), v)

    def run(*arrays: jax.Array, implementation: str | None) -> tuple[jax.Array, ...]:
        return attention(*arrays, mask, with_lse=False, implementation=implementation)[:1]  # type: ignore[return-value]

    return run, arguments, [out]


def statistics_case(dtype: str) -> tuple[Callable[..., tuple[jax.Array, ...]], list[jax.Array], list[np.ndarray]]:
    """As `decode_case`: the last rows of two prompts, in one block and in several."""
    rng = np.random.default_rng(0)
    length, first, count = 700, [600, 200], [100, 290]
    arguments = [jnp.asarray(rng.standard_normal((2, length, h, 128)), dtype) for h in (8, 2)]
    q, k = (np.asarray(x, np.float64) for x in arguments)
    logits = np.einsum("bthd,bshd->bhts", q, np.repeat(k, 4, axis=2)) * 128**-0.5
    row, column = np.arange(length)[:, None], np.arange(length)[None]
    logits = np.where(column <= row, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    sums = np.stack([weights[b, :, f : f + n].sum(axis=1) for b, (f, n) in enumerate(zip(first, count))])
    arguments += [jnp.asarray(x, jnp.int32) for x in (first, count)]
    return lambda *a, implementation: column_statistics(*a, implementation=implementation)[:1], arguments, [sums]


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument(
        "--decode", nargs="*", default=DECODE, help="batch,queries,heads,KV heads,lanes,slots,head size"
    )
    parser.add_argument("--prefill", nargs="*", default=PREFILL, help="batch,length,heads,KV heads,head size,mask")
    parser.add_argument("--dtypes", nargs="+", choices=MOST, default=list(MOST))
    args = parser.parse_args()
    ops = [("decode_attention", case, decode_case, ("pallas_gpu", "xla_wide", None)) for case in args.decode]
    ops += [("attention", case, prefill_case, ("cudnn", "xla_wide", None)) for case in args.prefill]
    ops += [("column_statistics", "", lambda _, dtype: statistics_case(dtype), ("xla_columns", None))]
    rows, lines, wrong = [], [], 0
    for (op, case, make, names), dtype in itertools.product(ops, args.dtypes):
        function, arguments, wanted = make(case, dtype)
        for name in names:
            try:
                found = jax.jit(functools.partial(function, implementation=name))(*arguments)
                result: float | str = max(difference(x, y) for x, y in zip(found, wanted, strict=True))
            except (NotImplementedError, ValueError) as reason:
                result = f"{type(reason).__name__}: {reason}"
            wrong += isinstance(result, float) and not result < MOST[dtype]
            rows.append({"op": op, "case": case, "dtype": dtype, "implementation": name, "result": result})
            shown = f"{result:.1e}" if isinstance(result, float) else result
            lines.append([op, case, dtype, name or "default", shown])
    harness.table(["", "case", "dtype", "implementation", "relative difference"], lines)
    harness.finish("correctness", {"most": MOST}, rows, args.json)
    if wrong:
        raise SystemExit(f"{wrong} of {len(rows)} differ by more than {MOST}")


if __name__ == "__main__":
    main()
