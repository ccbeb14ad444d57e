"""What the benchmarks share: random models, prompts, the same model in transformers, timing, tables and records."""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax import Batch
from vlcache_jax.files.writing import write_text
from vlcache_jax.inputs import TEXT
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.registry import write_config
from vlcache_jax.models.io.params_writer import save_params
from vlcache_jax.models.vision.config import VisionConfig

IMAGE_TOKEN = 3


def _llava(vision: dict[str, int], decoder: dict[str, Any]) -> LlavaConfig:
    return LlavaConfig(
        model_type="llava",
        vision=VisionConfig(**vision),
        decoder=DecoderConfig(family="llama", **decoder),
        image_token_id=IMAGE_TOKEN,
        feature_layers=(vision["num_layers"],),
        bos_token_id=1,
        pad_token_id=0,
        eos_token_ids=(2,),
    )


SHAPES: dict[str, LlavaConfig] = {
    # The shipped demo checkpoint: 256 visual tokens.
    "demo": _llava(
        {"hidden_size": 128, "intermediate_size": 512, "num_layers": 3, "num_heads": 4, "image_size": 512,
         "patch_size": 32},
        {"vocab_size": 200, "hidden_size": 192, "intermediate_size": 512, "num_layers": 6, "num_heads": 6,
         "num_kv_heads": 2, "head_dim": 32, "max_positions": 2048},
    ),
    # 300M parameters; 576 visual tokens, as LLaVA-1.5.
    "300m": _llava(
        {"hidden_size": 256, "intermediate_size": 1024, "num_layers": 4, "num_heads": 4, "image_size": 336,
         "patch_size": 14},
        {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 3072, "num_layers": 21, "num_heads": 16,
         "num_kv_heads": 8, "head_dim": 64, "max_positions": 4096},
    ),
    # For the tests of these scripts.
    "smoke": _llava(
        {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "image_size": 32,
         "patch_size": 8},
        {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4,
         "num_kv_heads": 2, "head_dim": 8, "max_positions": 512},
    ),
    # LLaVA-NeXT on Mistral 7B: only its shape is used.
    "7b": _llava(
        {"hidden_size": 1024, "intermediate_size": 4096, "num_layers": 23, "num_heads": 16, "image_size": 336,
         "patch_size": 14},
        {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32,
         "num_kv_heads": 8, "head_dim": 128, "max_positions": 32768},
    ),
}  # fmt: skip


def random_params(model: Llava, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    """Parameters drawn where they will be used: normal(0.02), norm scales and biases near 1 and 0."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(model.abstract_params())
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key: jax.Array, shape: tuple[int, ...], around: int) -> jax.Array:
        return around + jnp.asarray(0.02, dtype) * jax.random.normal(key, shape, dtype)

    drawn = [draw(key, x.shape, int(path[-1].key == "scale")) for key, (path, x) in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def count_params(params: Any) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


def random_batch(
    config: LlavaConfig, rows: int, length: int, seed: int = 0, bucket: int | None = None, question: int | None = None
) -> Batch:
    """Prompts of random text and one image, `length` tokens in all, padded to `bucket`.

    `question` tokens follow the image, or all but the first 8 of the text.
    """
    rng = np.random.default_rng(seed)
    visual = config.features_per_tile
    first = 8 if question is None else length - visual - question
    if first < 0 or length < first + visual + 1:
        raise SystemExit(f"{length} tokens are too few: an image of this model takes {visual}, and text comes with it")
    bucket = length if bucket is None else bucket
    tokens = rng.integers(IMAGE_TOKEN + 1, config.decoder.vocab_size, (rows, bucket)).astype(np.int32)
    tokens[tokens == config.image_token_id] += 1  # only where the images are
    tokens[:, length:] = config.pad_token_id
    tokens[:, first : first + visual] = config.image_token_id
    index = np.full((rows, bucket), TEXT, np.int32)
    index[:, first : first + visual] = np.arange(visual)
    size = config.vision.image_size
    pixels = rng.standard_normal((rows, 1, size, size, 3), dtype=np.float32)
    arrays = (tokens, np.full((rows,), length, np.int32), index, pixels)
    return Batch(*(jnp.asarray(x) for x in arrays))


def in_transformers(config: LlavaConfig, params: Any, threads: int) -> Any:
    """The same model as transformers' `LlavaForConditionalGeneration` on torch's CPU, in float32."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_config(config, folder)
        save_params(params, folder, config)
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # both sides run every step
    return model.eval()


def torch_inputs(batch: Batch) -> dict[str, Any]:
    """Inputs of `in_transformers(...).generate` for prompts without padding."""
    import torch

    ids = torch.from_numpy(np.array(batch.tokens, np.int64))
    pixels = torch.from_numpy(np.array(batch.pixels[:, 0]).transpose(0, 3, 1, 2).copy())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each repetition."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def record(self) -> dict[str, float]:
        """Median, fastest and slowest, in seconds."""
        return {"median": self.median, "min": min(self.seconds), "max": max(self.seconds)}


def timed(function: Callable[[], Any]) -> float:
    """Seconds until the result is there."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def repeated_copy(rounds: int) -> Callable[[jax.Array], jax.Array]:
    """One program that reads and writes an array so many times: the yardstick of everything bound by bandwidth."""
    return jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, y: y + 1, x))


def alternate(sides: Mapping[str, Callable[[], float]], repeats: int, warm: bool = True) -> dict[str, Timing]:
    """Runs all sides in turn, A B A B ..., so that slow changes of the machine hit all.

    Before every run that counts there is one that does not: caches are cold after the other side's work, and its
    threads still wait for more by spinning.

    Args:
      sides: name to a function that runs once and returns the seconds to count.
      repeats: rounds that count.
      warm: whether there is a run before every one that counts; runs of minutes need none.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            if warm:
                run()
            seconds[name].append(run())
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    return {name: Timing(tuple(s)) for name, s in seconds.items()}


def beside_copy(timings: Mapping[str, Timing], moved: Mapping[str, int], unit: str) -> list[dict[str, Any]]:
    """Prints, and returns as records, the bandwidth of every side and its share of that of the side "copy".

    Args:
      timings: of the sides.
      moved: bytes that each reads or writes at least.
      unit: of the printed times, "ms" or "us".
    """
    scale, digits = {"ms": (1e3, 3), "us": (1e6, 1)}[unit]
    speed = {name: moved[name] / timing.median for name, timing in timings.items()}
    share = {name: speed[name] / speed["copy"] for name in timings}
    table(["", unit, "GB/s", "share of the copy"], [
        [name, spread(timing.record(), scale, digits), f"{speed[name] / 1e9:.0f}", f"{share[name]:.0%}"]
        for name, timing in timings.items()
    ])  # fmt: skip
    return [
        {
            "name": name,
            "seconds": timing.record(),
            "bytes": moved[name],
            "bytes_per_second": speed[name],
            "share_of_copy": share[name],
        }
        for name, timing in timings.items()
    ]


def ratio(numerator: Timing, denominator: Timing) -> dict[str, float]:
    """Median, lowest and highest ratio of the two within a round."""
    rounds = [a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=True)]
    return {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds)}


def spread(values: Mapping[str, float], scale: float = 1.0, digits: int = 2) -> str:
    """`median (min-max)` of a `record` or a `ratio`."""
    median, low, high = (f"{values[k] * scale:.{digits}f}" for k in ("median", "min", "max"))
    return f"{median} ({low}-{high})"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the record here")
    return parser


def finish(name: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """Prints where this was measured; writes the record if asked to."""
    record = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": _machine(),
        "versions": _versions(),
        "settings": dict(settings),
        "rows": list(rows),
    }
    machine = record["machine"]
    print(f"{record['date']}; {machine['cpu']}, {machine['cores']} cores, load {machine['load']}; "
          + ", ".join(f"{k} {v}" for k, v in record["versions"].items()))  # fmt: skip
    if path is not None:
        write_text(path, json.dumps(record, indent=1) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    for line in (header, ["-" * w for w in widths], *rows):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |", flush=True)


def _machine() -> dict[str, Any]:
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = f"{names[0]} ({cpu})" if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # of the last minute, the benchmark included
        "system": platform.system(),
        "devices": sorted({d.device_kind for d in jax.devices()}),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("vlcache-jax", "jax", "jaxlib", "flax", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
