"""Programs that XLA compiles while different prompts of one bucket are answered, in different ways.

Greedy or at two temperatures, and at three lengths of answers that share their room. jax reports every compilation by
its program's name. The first prompts compile what there is to compile: prefill, the decoding loop, and small programs
around them, one of which cuts an answer to each of the three lengths.

    python benchmarks/compile_count.py --shape demo --bucket 512 --prompts 20
"""

import collections
import logging
import re

import harness
import jax
import numpy as np

import vlcache_jax as vlc
from vlcache_jax.models.families.llava.model import Llava

SAMPLINGS = (None, vlc.Sampling(temperature=0.7, top_k=20), vlc.Sampling(temperature=1.3, top_p=0.9))


class Compilations(logging.Handler):
    """Collects the names of compiled programs from the messages of `jax.log_compiles`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = re.match(r"Finished XLA compilation of (?:jit\()?(\w+)", record.getMessage())
        if found:
            self.names.append(found[1])


def count(model: Llava, params: dict, policy: vlc.Policy, bucket: int, prompts: int, steps: int) -> dict[str, int]:
    """Compilations of prefill and decoding over all prompts, and of anything else after the first three."""
    handler = Compilations()
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        with jax.log_compiles():
            rng = np.random.default_rng(0)
            first: list[str] = []
            later: list[str] = []
            shortest = model.config.features_per_tile + 16
            for prompt in range(prompts):
                length = int(rng.integers(shortest, bucket + 1))
                batch = harness.random_batch(model.config, 1, length, seed=prompt, bucket=bucket)
                before = len(handler.names)
                sampling = SAMPLINGS[prompt // 3 % 3]
                out = vlc.generate(model, params, batch, policy, steps - prompt % 3, sampling=sampling, seeds=prompt)
                jax.block_until_ready(out)
                names = first if prompt < 3 else later
                names += handler.names[before:]
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    every = collections.Counter(first + later)
    other = [n for n in later if n not in ("_prefill", "chunk")]
    return {"prefill": every["_prefill"], "decode": every["chunk"], "other": len(other)}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shape", choices=harness.SHAPES, default="demo")
    parser.add_argument("--bucket", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()

    model = Llava(harness.SHAPES[args.shape])
    params = harness.random_params(model)
    rows = []
    for policy in (vlc.FullCache(), vlc.VLCache(budget=0.1)):
        found = count(model, params, policy, args.bucket, args.prompts, args.steps)
        rows.append({"policy": policy.name, **found})
    harness.table(
        ["policy", "prefill", "decode", "other, after the first 3 prompts"],
        [[row["policy"], *(str(row[k]) for k in ("prefill", "decode", "other"))] for row in rows],
    )
    settings = {"model": args.shape, "bucket": args.bucket, "prompts": args.prompts, "steps": args.steps}
    harness.finish("compile_count", settings, rows, args.json)


if __name__ == "__main__":
    main()
