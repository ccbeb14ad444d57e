"""Requests per second of the engine that a chip's published figures allow: a compressed cache against the full one.

Nothing runs. The TPU's compiler says what weights, a row of the decode batch and a micro-batch's prefill take; a GPU is
taken to need the same. As many rows as fit decode beside one another, at most `--most-rows`. One request takes

    reading / rate + new tokens * (weights + rows * row) / bandwidth / rows

where reading is the products of the decoder and the vision tower, once each, and attention over half of the pairs. Both
are what the hardware cannot do faster, so that the ratio is a bound where reading is as slow as `--utilisation` says.

    python benchmarks/engine_planned.py --model qwen3-vl-8b --length 2048 --new-tokens 64 256 1024
"""

import dataclasses
import math
from typing import Any

import harness
import jax
import jax.numpy as jnp

import vlcache_jax as vlc
from vlcache_jax.models.families.registry import family_of, preset
from vlcache_jax.planning.chips import CHIPS
from vlcache_jax.planning.placement import default_axes
from vlcache_jax.planning.programs import Programs, Workload
from vlcache_jax.planning.topologies import make_mesh, tpu_devices

FLOPS = {"v5e": 197e12, "v6e": 918e12}  # a second, of a chip in bfloat16; the pages that planning/chips.py names
H200 = (141e9, 4.8e12, 989e12)  # bytes, bytes a second, dense bfloat16 a second; NVIDIA's data sheet
SAMPLE, MICRO_BATCH = 16, 4096  # rows that are sized at once; tokens of a micro-batch


@dataclasses.dataclass(frozen=True)
class Machine:
    """Of one device; `devices` work on one request."""

    name: str
    devices: int
    available: float
    bandwidth: float
    flops: float
    sizes: dict[str, "Sizes"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of one device."""

    weights: int
    decoder: int
    row: float
    prefill: int

    def rows(self, available: float, most: int) -> int:
        return max(1, min(most, int((available - self.weights - self.prefill) // self.row)))


def reading(config: Any, params: Any, length: int, patches: int) -> float:
    """Operations for one prompt."""
    decoder = params["decoder"]
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(decoder["layers"]))
    tower = sum(math.prod(x.shape) for name, tree in params.items() if name != "decoder" for x in jax.tree.leaves(tree))
    spec = config.decoder
    pairs = length * length / 2
    return 2 * size * length + 4 * pairs * spec.num_layers * spec.num_heads * spec.head_dim + 2 * tower * patches


def sizes(programs: Programs, policy: vlc.Policy, length: int, new_tokens: int, tiles: int) -> Sizes:
    work = Workload(batch=SAMPLE, prompt=length, new_tokens=new_tokens, tiles=tiles)
    row = programs.bytes_of(programs.state(work, policy)) / SAMPLE
    few = dataclasses.replace(work, batch=max(1, MICRO_BATCH // length))
    prefill, _ = programs.prefill(few, policy)
    if prefill.peak_bytes is None:
        raise SystemExit(f"{policy.name}: the compiler refuses the prefill: {prefill.refused}")
    weights = programs.bytes_of(programs.params)
    decoder = {name: x for name, x in programs.params["decoder"].items() if name != "embed_tokens"}
    return Sizes(weights, programs.bytes_of(decoder), row, prefill.peak_bytes - weights)


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", default="qwen3-vl-8b")
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x4", "v6e:1x1"])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--most-rows", type=int, default=256)
    parser.add_argument("--utilisation", type=float, default=0.5, help="of the published rate, while prompts are read")
    args = parser.parse_args()

    config, policies = preset(args.model), (vlc.FullCache(), vlc.VLCache(budget=args.budget))
    family = family_of(config)
    model, tiles = family.model(config, jnp.bfloat16), family.image_tiles(config)
    machines = []
    for topology in args.topologies:
        chip, devices = CHIPS[topology.split(":")[0]], tpu_devices(topology)
        programs = Programs(model, make_mesh(devices, default_axes(len(devices), config.decoder.num_kv_heads)))
        found = {x.name: sizes(programs, x, args.length, max(args.new_tokens), tiles) for x in policies}
        rate = FLOPS[topology.split(":")[0]]
        available = programs.available_bytes()
        machines.append(Machine(topology, len(devices), available, chip.hbm_bytes_per_second, rate, found))
    alone = next((machine for machine in machines if machine.devices == 1), None)
    if alone is not None:
        machines.append(Machine("H200", 1, 0.9 * H200[0], H200[1], H200[2], alone.sizes))

    operations = reading(config, model.abstract_params(), args.length, tiles)
    records, lines = [], []
    for machine in machines:
        prefill = operations / (machine.devices * machine.flops * args.utilisation)
        for new in args.new_tokens:
            taken, rows = {}, {}
            for name, size in machine.sizes.items():
                rows[name] = size.rows(machine.available, args.most_rows)
                step = (size.decoder + rows[name] * size.row) / machine.bandwidth
                taken[name] = prefill + new * step / rows[name]
            full, ours = (policy.name for policy in policies)
            ratio, most = taken[full] / taken[ours], (taken[full] - prefill) / (taken[ours] - prefill)
            records.append({"name": machine.name, "new": new, "prefill": prefill, "seconds": taken, "rows": rows})
            times = [f"{1e3 * (taken[name] - prefill):.1f}" for name in (full, ours)]
            cells = [str(new), str(rows[full]), str(rows[ours]), f"{1e3 * prefill:.0f}", *times]
            lines.append([machine.name, *cells, f"{most:.1f}", f"{ratio:.2f}"])
    header = ["", "new tokens", "rows, full", "rows, VL-Cache", "ms reading", "ms decoding, full", "ms, VL-Cache"]
    harness.table([*header, "x decoding", "x requests/s"], lines)
    kept = {name: dataclasses.asdict(size) for m in machines for name, size in m.sizes.items()}
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    harness.finish("engine_planned", settings | {"sizes": kept, "operations": operations}, records, args.json)


if __name__ == "__main__":
    main()
