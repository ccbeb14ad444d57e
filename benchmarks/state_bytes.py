"""Bytes of the compressed state over those of the full cache, from the real prefill's shapes; nothing is computed.

python benchmarks/state_bytes.py
"""

import harness
import jax
import jax.numpy as jnp

import vlcache_jax as vlc
from vlcache_jax.models.families.llava.model import Llava


def context_bytes(shape: str, length: int, policy: vlc.Policy) -> int:
    """Bytes of the context's buffers of one prompt in bfloat16, by tracing `vlc.prefill`."""
    config = harness.SHAPES[shape]
    model = Llava(config, jnp.bfloat16)
    integers = jax.ShapeDtypeStruct((1, length), jnp.int32)
    size = config.vision.image_size
    pixels = jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.float32)
    batch = vlc.Batch(integers, jax.ShapeDtypeStruct((1,), jnp.int32), integers, pixels)
    _, state = jax.eval_shape(lambda p, b: vlc.prefill(model, p, b, policy).start(64), model.abstract_params(), batch)
    return state.context.nbytes


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=harness.SHAPES, default=["7b", "300m"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.05, 0.1, 0.2])
    args = parser.parse_args()

    rows, lines = [], []
    for shape in args.shapes:
        for length in args.lengths:
            if length + 64 > harness.SHAPES[shape].decoder.max_positions:
                continue
            full = context_bytes(shape, length, vlc.FullCache())
            cells = []
            for budget in args.budgets:
                kept = context_bytes(shape, length, vlc.VLCache(budget=budget))
                rows.append({"shape": shape, "length": length, "budget": budget, "state_bytes": kept,
                             "full_bytes": full, "ratio": kept / full})  # fmt: skip
                cells.append(f"{kept / full:.4f}")
            lines.append([shape, str(length), f"{full / 2**20:.1f}", *cells])
    harness.table(["shape", "prompt", "full MiB", *(f"budget {b:g}" for b in args.budgets)], lines)
    harness.finish("state_bytes", {"dtype": "bfloat16", "batch": 1}, rows, args.json)


if __name__ == "__main__":
    main()
