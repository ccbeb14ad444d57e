"""Programs with coded weights, compiled by the real TPU compiler: codes are read where they lie, once, as codes."""

import dataclasses
import re

import jax
import pytest
from tpu import chip_llava, compile_for, mesh_of, shape, temporaries

import vlcache_jax as vlc
from vlcache_jax.kernels.quantised_matmul import quantised_matmul
from vlcache_jax.models.coding import CODED, weight_coding
from vlcache_jax.planning.programs import Programs, Workload

WORK = Workload(batch=3, prompt=128, new_tokens=128, tiles=0)  # 384 tokens: no weight has such a side


def float_copies(text, layers):
    """Arrays of floats as large as a coded projection, or a device's part of one, that a program makes in memory."""
    codes = [x for path, x in jax.tree_util.tree_leaves_with_path(layers) if path[-1].key == "codes"]
    sizes = {tuple(sorted(x.sharding.shard_shape(x.shape)[1:])) for x in codes}
    found, fused = [], False
    for line in text.splitlines():
        if line.endswith("{"):
            fused = "fused_computation" in line  # what is within a fusion is in registers
        made = re.match(r"\s*(?:ROOT )?%\S+ = (?:bf16|f32)\[([\d,]+)\]\S* (\w[\w-]*)\(", line)
        if made and not fused and made[2] not in ("parameter", "copy-done"):
            sides = tuple(sorted(n for n in map(int, made[1].split(",")) if n > 1))
            found += [line.strip()[:200]] if sides in sizes else []
    return found


def thorough(*values):
    return pytest.param(*values, marks=pytest.mark.thorough)


@pytest.mark.parametrize(("topology", "weights", "axes", "kinds"), [
    ("v5e:2x2", "int8", {}, ("decode_step",)),
    ("v5e:2x2", "int4", {}, ("decode_step", "prefill")),
    ("v5e:2x2", "int4", {"model": 4}, ("decode_step",)),
    *[
        thorough(topology, weights, axes, ("decode_step", "prefill"))
        for topology in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
        for weights in ("int8", "int4")
        for axes in ({}, {"model": 4})
    ],
])  # fmt: skip
def test_no_program_makes_floats_of_a_whole_weight(topology, weights, axes, kinds):
    model = dataclasses.replace(chip_llava(), weights=weight_coding(weights))
    programs = Programs(model, mesh_of(topology, {"data": 1, "model": 1} | axes))
    layers = programs.params["decoder"]["layers"]
    assert sum(path[-1].key in CODED for path, _ in jax.tree_util.tree_leaves_with_path(layers)) == 14
    for kind in kinds:
        program, compiled = getattr(programs, kind)(WORK, vlc.VLCache(0.25))
        assert program.refused is None
        implementation = "quantised_matmul=" + ("pallas_tpu" if weights == "int4" else "xla <")
        assert any(name.startswith(implementation) for name in program.implementations)
        assert not float_copies(compiled.as_text(), layers)
        if kind == "decode_step":
            # Sums over chips take that on v5p and v6e, whatever they sum; v5e fetches codes of so small parts ahead.
            own = 3 * 2**19 if axes else 0
            assert program.temporary_bytes < program.argument_bytes / 16 + own  # arguments are weights, nearly all


@pytest.mark.parametrize("topology", ["v5e:2x2", *map(thorough, ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2"))])
@pytest.mark.parametrize(("rows", "channels", "features", "bits", "shifted"), [
    (1, 4096, 11008, 4, True), (16, 11008, 4096, 4, False), (2000, 4096, 2752, 4, True), (8, 896, 608, 8, True),
])  # fmt: skip
def test_the_kernel_reads_its_layer_of_a_stack(topology, rows, channels, features, bits, shifted):
    layers, groups = 8, channels // 128
    table = shape(layers, groups, features, dtype="float32")
    codes = shape(layers, channels, features, dtype=f"int{bits}")
    number = shape(dtype="int32")
    arguments = shape(rows, channels), codes, table, table if shifted else None, number
    program = compile_for(topology, quantised_matmul, *arguments)
    of_layer = channels * features * bits // 8 + 4 * groups * features * (1 + shifted)
    x = 2 * rows * channels * (-(-features // 512) if rows > 512 else 1)
    least = of_layer * -(-rows // 512) + x + 2 * rows * features
    # Tables whose groups fill no tiles of 8 XLA keeps in another order than kernels read: it copies them, once.
    tables = 4 * layers * groups * features * (1 + shifted)
    copied = 0 if groups % 8 == 0 and features % 128 == 0 else 3 * tables
    assert temporaries(program) < copied + 2**20
    assert program.cost_analysis()["bytes accessed"] < 1.1 * least + copied
