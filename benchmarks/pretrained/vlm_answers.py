"""What compression costs the VLM of train_vlm.py, whose attention nobody shaped: exact answers on held-out strips.

    python benchmarks/pretrained/vlm_answers.py smollm2 run --samples 48

The first question of each strip, which the model has to read off a picture of 256 visual tokens. Right answers of every
policy, and the 95 % interval of the paired difference to the full cache, in points.
"""

import argparse
import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from strips import stream
from train_vlm import trained, with_tower

import vlcache_jax as vlc
from vlcache_jax.demo.data.samples import HELD_OUT_SEED
from vlcache_jax.evaluation.metrics import bootstrap_interval
from vlcache_jax.policies.allocate.uniform import Uniform

NEW_TOKENS, LENGTH, ROWS = 10, 320, 8


def policies() -> dict[str, vlc.Policy]:
    """By what the table calls them."""
    found: dict[str, vlc.Policy] = {"full cache": vlc.FullCache(), "all at 4 bits": vlc.FullCache(bits=4)}
    for budget in (0.25, 0.1):
        found |= {
            f"ranked bits {budget:g}": vlc.RankedBits(budget),
            f"VL-Cache {budget:g}": vlc.VLCache(budget),
            f"VL-Cache's scores, equal layers {budget:g}": dataclasses.replace(vlc.VLCache(budget), allocate=Uniform()),
            f"SnapKV {budget:g}": vlc.SnapKV(budget),
            f"H2O {budget:g}": vlc.H2O(budget),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="from make_checkpoint.py")
    parser.add_argument("run", type=Path, help="of train_vlm.py")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--only", help="policies whose name holds that")
    args = parser.parse_args()
    vlm = with_tower(vlc.load(args.folder, dtype="float32", layout="stacked"), "float32")
    vlm = trained(vlm, args.run, adapted=True)
    strips = list(itertools.islice(stream(HELD_OUT_SEED, 0, ("documents",)), args.samples))
    asked = [
        [{"role": "user", "content": [{"type": "image", "image": Image.fromarray(strip.image)},
                                      {"type": "text", "text": strip.questions[0][0]}]}]
        for strip in strips
    ]  # fmt: skip
    batches = [vlm.processor.chat(asked[i : i + ROWS], pad_to=LENGTH) for i in range(0, len(asked), ROWS)]
    wanted = [strip.questions[0][1] for strip in strips]
    whole = None
    for name, policy in policies().items():
        if args.only and args.only not in name and whole is not None:
            continue
        said, bytes_ = [], []
        for batch in batches:
            out = vlc.generate(vlm.model, vlm.params, batch, policy, max_new_tokens=NEW_TOKENS)
            said += vlm.processor.decode(out)
            bytes_.append(out.report.state_bytes / out.report.full_bytes)
        right = np.array([a.strip() == b for a, b in zip(said, wanted, strict=True)], float)
        whole = right if whole is None else whole
        _, low, high = bootstrap_interval(100 * (right - whole))
        # Of a cache of 16 bits, where this one has 32. Short prompts fill a part of a store's slots only.
        share = np.mean(jax.device_get(bytes_)) * (2 if "bits" in name else 1)
        points = f"{100 * right.mean():.0f} % ({low:+.0f} to {high:+.0f})"
        print(f"{name}: {points}, bytes {share:.2f}, {said[:3]}", flush=True)


if __name__ == "__main__":
    main()
