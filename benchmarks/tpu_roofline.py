"""What a TPU must read and compute: bytes and flops of the programs that its compiler makes, without a TPU.

Encode, prefill and compress, and a decode step of 7B models are compiled for a slice of v5e. Their optimised text is
added up on one chip: an instruction reads its operands from HBM (of a stacked array the slice that it takes) and writes
its result, products count 2 flops a term, and the body of a loop counts as often as it runs. Kernels are opaque to the
compiler: what they read and compute follows from their formula. Beside it stands the least that there is to do: weights
and kept state read once; the products of the model's own formula.

    python benchmarks/tpu_roofline.py --models llava-v1.6-mistral-7b --batches 8 --budgets 0.1
"""

import collections
import dataclasses
import functools
import math
import re

import harness
import jax
import jax.numpy as jnp
import numpy as np

import vlcache_jax as vlc
from vlcache_jax.models.coding import weight_coding
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.registry import preset
from vlcache_jax.planning.compiling import compile_on
from vlcache_jax.planning.programs import Programs, Workload
from vlcache_jax.planning.topologies import make_mesh, tpu_devices

WIDTH = {"s4": 0.5, "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
LINE = re.compile(r"^\s*(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
SCORED = 64  # rows that score, whose number is data
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "after-all", "copy-done", "while",
        "conditional", "call", "all-reduce-done", "partition-id", "add-dependency", "opt-barrier"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Line:
    """An instruction: its name, result, operation, operands and all of its text."""

    name: str
    result: str
    op: str
    operands: tuple[str, ...]
    text: str

    def called(self, key: str) -> str:
        return re.search(rf"{key}=(%[\w.\-]+)", self.text)[1]


def arrays(result: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """(dtype, sizes, whether it lies in HBM) of a result, or of each part of a tuple."""
    found = ARRAY.findall(result)
    return [(kind, tuple(map(int, sizes.split(","))) if sizes else (), "S(" not in layout)
            for kind, sizes, layout in found if kind in WIDTH]  # fmt: skip


def size(result: str) -> float:
    """Bytes in HBM."""
    return sum(WIDTH[kind] * math.prod(sizes) for kind, sizes, in_hbm in arrays(result) if in_hbm)


class Costs:
    """Bytes and flops of an optimised program; `kernel` gives those of a Pallas kernel by its line and shapes."""

    def __init__(self, text: str, kernel) -> None:
        self.kernel, self.computations, entry, current = kernel, {}, "", None
        for line in text.splitlines():
            head = re.match(r"^(ENTRY )?(%[\w.\-]+) .*\{$", line)
            if head:
                current = self.computations[head[2]] = {}
                entry = head[2] if head[1] else entry
            elif current is not None and (found := LINE.match(line)):
                name, result, op, rest = found.groups()
                operands = tuple(re.findall(r"%[\w.\-]+", rest.split("), ")[0]))
                current[name] = Line(name, result, op, operands, line)
        self.bytes, self.flops, self.by_place = 0.0, 0.0, collections.Counter()
        self._add(entry, 1)

    def _add(self, computation: str, times: int) -> None:
        lines = self.computations[computation]
        for line in lines.values():
            if line.op == "while":
                self._add(line.called("body"), times * self._trips(line.called("condition")))
            elif line.op == "conditional":
                for name in re.findall(r"%[\w.\-]+", re.search(r"branch_computations=\{([^}]*)\}", line.text)[1]):
                    self._add(name, times)
            elif line.op == "call":
                self._add(line.called("to_apply"), times)
            self.flops += times * self._flops(line, lines)
            moved = times * self._bytes(line, lines)
            self.bytes += moved
            place = re.search(r'op_name="([^"]*)"', line.text)
            self.by_place[place[1].split("/")[-2:] and "/".join(place[1].split("/")[-2:]) if place else line.op] += (
                moved
            )

    def _trips(self, condition: str) -> int:
        """Of a loop that counts up to a constant; 1 where the number of rounds is data."""
        lines = self.computations[condition]
        root = next(x for x in lines.values() if "ROOT" in x.text)
        bound = [re.search(r"constant\((\d+)\)", lines[x].text) for x in root.operands if x in lines]
        return next((int(x[1]) for x in bound if x), 1)

    def _flops(self, line: Line, lines: dict[str, Line]) -> float:
        if line.op == "fusion":
            inside = self.computations[line.called("calls")]
            return sum(self._flops(x, inside) for x in inside.values())
        if line.op == "custom-call" and "tpu_custom_call" in line.text:
            return self.kernel(line.name, [arrays(lines[x].result)[0] for x in line.operands])[1]
        if line.op != "convolution":
            return 0
        left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.text).groups()
        a, b = (arrays(lines[x].result)[0][1] for x in line.operands[:2])
        c = arrays(line.result)[0][1]
        window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", line.text) or ["", ""])[1]))
        total = 2.0 * a[left.index("f")] * c[out.index("b")] * c[out.index("f")]
        for d in sorted(x for x in left if x.isdigit()):
            read = {k: v.split("x") for k, v in window.items()}
            stride, dilated = (int(read[k][int(d)]) if k in read else 1 for k in ("stride", "lhs_dilate"))
            spread = int(read["rhs_dilate"][int(d)]) if "rhs_dilate" in read else 1
            low = int(read["pad"][int(d)].split("_")[0]) if "pad" in read else 0
            at = np.arange(c[out.index(d)])[:, None] * stride + np.arange(b[right.index(d)])[None] * spread - low
            total *= np.sum((at >= 0) & (at <= (a[left.index(d)] - 1) * dilated) & (at % dilated == 0))
        return total

    def _bytes(self, line: Line, lines: dict[str, Line]) -> float:
        if line.op in FREE:
            return 0
        if line.op == "custom-call" and "tpu_custom_call" in line.text:
            return self.kernel(line.name, [arrays(lines[x].result)[0] for x in line.operands])[0]
        if line.op == "custom-call":  # AllocateBuffer and the like
            return 0
        if line.op == "dynamic-slice":
            return 2 * size(line.result)
        if line.op == "dynamic-update-slice":
            return 2 * size(lines[line.operands[1]].result)
        if line.op.endswith("-start"):  # its result names its operand once more
            return sum(size(lines[x].result) for x in line.operands if x in lines) + size(ARRAY.search(line.result)[0])
        if line.op != "fusion":
            return sum(size(lines[x].result) for x in line.operands if x in lines) + size(line.result)
        inside = self.computations[line.called("calls")]
        read = sum(self._read(line.called("calls"), i, lines[x].result) for i, x in enumerate(line.operands))
        root = next(x for x in inside.values() if "ROOT" in x.text)
        parts = [inside[x] for x in root.operands] if root.op == "tuple" else [root]
        written = 0
        for part, result in zip(parts, ARRAY.finditer(line.result)):
            while part.op == "bitcast":
                part = inside[part.operands[0]]
            update = part.op == "dynamic-update-slice"
            written += size(inside[part.operands[1]].result) if update else size(result[0])
        return read + written

    def _read(self, computation: str, number: int, result: str) -> int:
        """Bytes that a fusion reads of an operand: of one that it only cuts or gathers from, what it takes."""
        if not size(result):
            return 0
        lines = self.computations[computation]
        parameter = next(x for x in lines.values() if x.op == "parameter" and f"parameter({number})" in x.text)
        taken, waiting = 0, [parameter]
        while waiting:
            current = waiting.pop()
            for line in lines.values():
                if current.name not in line.operands:
                    continue
                at = line.operands.index(current.name)
                if line.op in ("dynamic-slice", "gather") and at == 0:
                    taken += sum(WIDTH[kind] * math.prod(sizes) for kind, sizes, _ in arrays(line.result))
                elif line.op == "dynamic-update-slice" and at == 0:
                    continue
                elif line.op == "bitcast" or self._is_tiling(line):
                    waiting.append(line)
                elif line.op == "fusion":
                    taken += self._read(line.called("calls"), at, result)
                else:
                    return size(result)
        return min(taken, size(result))

    def _is_tiling(self, line: Line) -> bool:
        """Whether a fusion in a fusion only reads its operand by other tiles."""
        inside = self.computations[line.called("calls")].values() if line.op == "fusion" else ()
        return {x.op for x in inside} == {"parameter", "copy"} and "output_to_operand_aliasing" in line.text


def kernel_costs(layers: int, name: str, operands: list) -> tuple[float, float]:
    """(bytes, flops) of a kernel for arrays of the shapes it is given."""
    amount = [WIDTH[kind] * math.prod(sizes) for kind, sizes, _ in operands]
    wide = [sizes for kind, sizes, _ in operands if len(sizes) >= 3 and kind in ("bf16", "f32")]  # 3 axes: of one row
    if name.startswith("%quantised_matmul"):  # of the stacks of codes and tables one layer's part
        return sum(x / layers if len(sizes) == 3 else x for x, (_, sizes, _) in zip(amount, operands)), 0
    if name.startswith("%append"):  # blocks of 16 slots, read and written
        rows, lanes, _, head_dim = operands[-1][1]
        return 4 * rows * lanes * 16 * head_dim * 2, 0
    if name.startswith("%decode_attention"):  # of each store one layer's part, as it is filled
        rows, lanes, slots, head_dim = operands[-1][1]
        query = operands[3][1]
        return (amount[-1] + amount[-2]) / layers, 4 * math.prod(query[:-1]) * head_dim * slots / layers
    length, head_dim = wide[0][-2:]
    if name.startswith("%column_statistics"):  # of each head the rows that score: those of a question, say
        return sum(amount), 2 * math.prod(wide[0][:-2]) * SCORED * length * head_dim
    if name.startswith("%splash"):  # half of the square, twice
        return sum(amount) + amount[3], 2 * math.prod(wide[0][:-2]) * length * (length + 1) * head_dim
    raise ValueError(f"the costs of the kernel {name} are not known")


def matrix_parameters(params: dict) -> int:
    """Weights of products: what has two axes besides that over layers."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return sum(math.prod(x.shape) for path, x in flat if path[-1].key == "kernel")


def ideal_flops(model, work: Workload, devices: int, part: str) -> float:
    """Of the model's formula, on one chip: products with weights, and those of attention."""
    c, shapes = model.config, model.abstract_params()
    vision, images = c.vision, work.batch * work.tiles
    tokens = vision.grid_size**2 + 1
    tower = 2 * images * tokens * (matrix_parameters(shapes["vision"]) + matrix_parameters(shapes["projector"]))
    tower += 4 * images * vision.num_layers * tokens**2 * vision.hidden_size
    if part == "encode":
        return tower / devices
    d = c.decoder
    layers = 2 * work.batch * work.prompt * matrix_parameters(shapes["decoder"]["layers"])
    attention = 2 * work.batch * d.num_layers * work.prompt**2 * d.num_heads * d.head_dim
    return (tower + layers + attention + 2 * work.batch * d.vocab_size * d.hidden_size) / devices


def rows_of(
    name: str, topology: str, batch: int, budget: float, prompt: int, model_axis: int, budgets, weights: str = "float"
) -> list[dict]:
    config = preset(name)
    model = Llava(config, jnp.dtype("bfloat16"), weights=weight_coding(weights))
    devices = tpu_devices(topology)
    programs = Programs(model, make_mesh(devices, {"data": len(devices) // model_axis, "model": model_axis}))
    policy = vlc.FullCache() if budget == 1 else vlc.VLCache(budget)
    work = Workload(batch=batch, prompt=prompt, new_tokens=256, tiles=1)
    layers = config.decoder.num_layers
    kernel = functools.partial(kernel_costs, layers)

    def encode(params, batch):
        pixels = batch.pixels.reshape(-1, *batch.pixels.shape[2:])
        return model.apply({"params": params}, pixels, method="encode_images")

    found = []
    for part in ("encode", "prefill", "decode step")[budget != budgets[0] :]:
        if part == "encode":
            compiled, why = compile_on(programs.mesh, encode, programs.params, programs._batch(work)), None
        else:
            program, compiled = (programs.prefill if part == "prefill" else programs.decode_step)(work, policy)
            why = program.refused
        row = {"model": name, "batch": batch, "budget": budget, "program": part}
        if compiled is None:
            found.append(row | {"refused": why})
            continue
        costs = Costs(compiled.as_text(), kernel)
        row |= {"bytes": costs.bytes, "flops": costs.flops}
        if part == "decode step":
            used = {k: v for k, v in programs.params["decoder"].items() if k != "embed_tokens"}
            state = programs.state(work, policy)
            least = programs.bytes_of(used) + sum(
                programs.bytes_of((store.keys, store.values)) for store in (*state.stores, state.tail)
            )
            row |= {"least": least, "ratio": costs.bytes / least}
        else:
            least = ideal_flops(model, work, len(devices), part)
            row |= {"least": least, "ratio": costs.flops / least}
        row["largest"] = [(place, round(moved / 2**20, 1)) for place, moved in costs.by_place.most_common(12)]
        found.append(row)
    return found


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["llava-1.5-7b", "llava-v1.6-mistral-7b"])
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--model-axis", type=int, default=8)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--budgets", nargs="+", type=float, default=[1.0, 0.1])
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--weights", default="float", help="of the decoder's projections: float, int8 or int4")
    args = parser.parse_args()
    rows = [
        row
        for name in args.models
        for batch in args.batches
        for budget in args.budgets
        for row in rows_of(name, args.topology, batch, budget, args.prompt, args.model_axis, args.budgets, args.weights)
    ]

    def shown(row: dict) -> list[str]:
        head = [row["model"], str(row["batch"]), f"{row['budget']:.0%}", row["program"]]
        if "refused" in row:
            return [*head, row["refused"][:60], "", "", ""]
        unit, what = (2**30, "GiB") if row["program"] == "decode step" else (1e12, "Tflop")
        return [*head, f"{row['bytes'] / 2**30:.2f}", f"{row['flops'] / 1e12:.3f}", f"{row['least'] / unit:.3f} {what}",
                f"{row['ratio']:.2f}"]  # fmt: skip

    harness.table(
        ["model", "batch", "kept", "program", "GiB", "Tflop", "least", "x least"], [shown(row) for row in rows]
    )
    settings = {"topology": args.topology, "model_axis": args.model_axis, "prompt": args.prompt}
    settings["weights"] = args.weights
    harness.finish("tpu_roofline", settings, rows, args.json)


if __name__ == "__main__":
    main()
