"""What pruning saves of a prefill: prompts of several images, dense and with a part of their visual tokens.

All methods keep the same part, those between layers behind an eighth of the layers.

    python benchmarks/pruning.py --shape 300m --images 8 --keep 0.25
"""

import dataclasses
from typing import Any

import harness
import jax.numpy as jnp
import numpy as np

import vlcache_jax as vlc
from vlcache_jax.inputs import TEXT
from vlcache_jax.models.families.llava.model import Llava

SIDES = {"300m": 17, "smoke": 4}
"""Patches along one side of an image: 8 of 17 x 17 are 2,312 visual tokens."""


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shape", choices=SIDES, default="300m")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--text", type=int, default=64, help="text tokens behind the images")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--methods", default="fast_v,feather,pyramid_drop,vision_zip,cd_pruner", help="some of these")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    config = harness.SHAPES[args.shape]
    side = SIDES[args.shape] * config.vision.patch_size
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=side))
    model, layer = Llava(config), max(1, config.decoder.num_layers // 8)
    params, batch = harness.random_params(model), several_images(config, args.images, args.text)
    methods: dict[str, Any] = {
        "fast_v": vlc.FastV(layer, args.keep),
        "feather": vlc.Feather((layer,), (args.keep,), stride=0),
        "pyramid_drop": vlc.PyramidDrop((layer,), (args.keep,)),
        "vision_zip": vlc.VisionZip(args.keep),
        "cd_pruner": vlc.CDPruner(args.keep),
    }
    chosen = {"dense": None} | {name: methods[name] for name in args.methods.split(",")}
    sides = {
        name: lambda pruning=pruning: harness.timed(lambda: vlc.prefill(model, params, batch, pruning=pruning).logits)
        for name, pruning in chosen.items()
    }
    timings = harness.alternate(sides, args.repeats)
    rows, lines = [], []
    for name, timing in timings.items():
        faster = harness.ratio(timings["dense"], timing)
        rows.append({"pruning": name, "seconds": timing.record(), "ratio": faster})
        lines.append([name, harness.spread(timing.record(), digits=3), harness.spread(faster)])
    harness.table(["prefill", "seconds", "times as fast as dense"], lines)
    settings = {
        "model": args.shape, "parameters": harness.count_params(params), "images": args.images, "length": batch.length,
        "layer": layer, "keep": args.keep, "repeats": args.repeats,
    }  # fmt: skip
    harness.finish("pruning", settings, rows, args.json)


def several_images(config: Any, images: int, text: int) -> vlc.Batch:
    """One prompt: 8 tokens, images side by side, text."""
    rng, visual, first = np.random.default_rng(0), images * config.vision.grid_size**2, 8
    length = first + visual + text
    tokens = rng.integers(harness.IMAGE_TOKEN + 1, config.decoder.vocab_size, (1, length)).astype(np.int32)
    index = np.full((1, length), TEXT, np.int32)
    index[:, first : first + visual] = np.arange(visual)
    tokens[index != TEXT] = harness.IMAGE_TOKEN
    size = config.vision.image_size
    pixels = rng.standard_normal((1, images, size, size, 3), dtype=np.float32)
    return vlc.Batch(*map(jnp.asarray, (tokens, np.full((1,), length, np.int32), index, pixels)))


if __name__ == "__main__":
    main()
