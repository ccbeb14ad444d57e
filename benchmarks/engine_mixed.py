"""Requests of the demo's six tasks, of one image and of two: programs, padding, and whether the host keeps up.

Images are PNG files that are decoded and resized as they are asked for. With `--fake-ms` the model is a tiny one of
random weights, and the device is a pause: so many milliseconds for each prompt that is read, and for each call that
decodes. The device may have nothing to do for at most a tenth of the time.

    python benchmarks/engine_mixed.py --requests 1000 --fake-ms 20
"""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import jax
from PIL import Image

import vlcache_jax as vlc
from vlcache_jax.demo.data.samples import HELD_OUT_SEED, TASKS, make_sample
from vlcache_jax.engine.programs import Programs
from vlcache_jax.files.writing import write_picture
from vlcache_jax.models.families.llava.model import Llava

DEMO = Path(vlc.__file__).parent / "assets" / "demo_model"


def requests(count: int, folder: Path) -> list[vlc.Request]:
    """One of each task in turn, each with the first question of its sample; the images are written to the folder."""
    found = []
    for number, task in zip(range(count), itertools.cycle(TASKS)):
        sample = make_sample(task, HELD_OUT_SEED, number, max_questions=1)
        paths = [str(folder / f"{number}-{i}.png") for i in range(len(sample.images))]
        for path, image in zip(paths, sample.images):
            write_picture(path, Image.fromarray(image))
        parts = [
            *({"type": "image", "image": path} for path in paths),
            {"type": "text", "text": sample.questions[0][0]},
        ]
        found.append(vlc.Request(id=number, prompt=[{"role": "user", "content": parts}]))
    return found


def tiny(vlm: Any) -> Any:
    """A model that takes what the demo's does, and costs next to nothing."""
    config = vlm.model.config
    vision = dataclasses.replace(config.vision, hidden_size=8, intermediate_size=8, num_heads=1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    model = Llava(dataclasses.replace(config, vision=vision, decoder=dataclasses.replace(config.decoder, **sizes)))
    return dataclasses.replace(vlm, model=model, params=harness.random_params(model), config=model.config)


class Paused(Programs):
    """Programs that take longer, without the processor's doing anything."""

    seconds = 0.0

    def read(self, batch: Any) -> Any:
        time.sleep(self.seconds * len(batch.lengths))
        return super().read(batch)

    def decode(self, *arguments: Any) -> Any:
        time.sleep(self.seconds)
        return super().decode(*arguments)


def counted(results: Iterator[vlc.Result]) -> int:
    ok = 0
    for result in results:
        assert result.ok, result.reason
        ok += 1
    return ok


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--fake-ms", type=float, default=0.0, help="0: the demo's own model")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0.1)
    args = parser.parse_args()
    vlm = vlc.load(DEMO, dtype="float32")
    if args.fake_ms:
        vlm = tiny(vlm)
    engine = vlc.Engine(vlm, vlc.VLCache(budget=args.budget), rows=args.rows, max_new_tokens=args.new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        asked = requests(args.requests, Path(folder))
        warm = engine.warmup(asked)
        if args.fake_ms:
            programs = engine._programs
            engine._programs = Paused(**{x.name: getattr(programs, x.name) for x in dataclasses.fields(programs)})
            Paused.seconds = args.fake_ms / 1000
        start = time.perf_counter()
        assert counted(engine.run(asked)) == args.requests
        seconds = time.perf_counter() - start
    stats = engine.stats()
    record = {
        "name": "a pause" if args.fake_ms else "demo",
        "seconds": seconds,
        "buckets": [list(bucket) for bucket in engine.buckets],
        "programs": warm.programs,
        "compilations": stats.compilations,
        "padding_share": stats.padding_share,
        "idle_row_share": stats.idle_row_share,
        "idle_share": stats.idle_share,
    }
    shares = [f"{record[name]:.1%}" for name in ("padding_share", "idle_row_share", "idle_share")]
    sizes = ", ".join(f"{tokens} x {tiles}" for tokens, tiles, *_ in engine.buckets)
    rate = f"{args.requests / seconds:.1f}"
    header = ["device", "requests/s", "buckets", "programs", "compiled", "padding", "idle rows", "idle device"]
    harness.table(header, [[record["name"], rate, sizes, str(warm.programs), str(stats.compilations), *shares]])
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    harness.finish("engine_mixed", settings | {"backend": jax.default_backend()}, [record], args.json)


if __name__ == "__main__":
    main()
