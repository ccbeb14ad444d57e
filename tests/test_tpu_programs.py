"""The programs of llava-v1.6-mistral-7b, compiled for TPUs: copies, memory and collectives."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from tpu import mesh_of

import vlcache_jax as vlc
from vlcache_jax.inference.row_options import row_options
from vlcache_jax.inference.rows import Prompt, insert_rows
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.registry import preset
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.mesh import specs_of
from vlcache_jax.planning.compiling import abstract, compile_on
from vlcache_jax.planning.placement import place
from vlcache_jax.planning.programs import Programs, Workload

WORK = Workload(batch=8, prompt=8192, new_tokens=256, tiles=0)
POLICY = vlc.VLCache(budget=0.1)

_COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)


def _programs(topology, **axes):
    mesh = mesh_of(topology, {"data": 1, "model": 1} | axes)
    return Programs(Llava(preset("llava-v1.6-mistral-7b"), jnp.dtype("bfloat16")), mesh)


def _check_decode_step(programs):
    """The donated state is aliased as a whole; what a step needs besides is under 2 % of it. Returns the program."""
    program, compiled = programs.decode_step(WORK, POLICY)
    assert program.refused is None
    state = programs.state(WORK, POLICY)
    stores = programs.bytes_of((state.context, state.tail))
    assert program.alias_bytes >= stores
    assert program.temporary_bytes < 0.02 * stores
    return compiled


@pytest.mark.parametrize("topology", ["v6e:1x1", pytest.param("v5p:1x1x1", marks=pytest.mark.thorough)])
def test_decode_step_copies_nothing(topology):
    _check_decode_step(_programs(topology))


def test_heads_on_eight_chips_reduce_twice_a_layer():
    """One sum after attention's output projection, one after the MLP; attention itself talks to no other chip.

    The layers are one loop, so its body stands in the program once. Outside it one number a row is gathered: whether
    its logits, which are spread over the chips, are finite.
    """
    text = _check_decode_step(_programs("v5e:2x4", model=8)).as_text()
    collectives = [line for line in text.splitlines() if _COLLECTIVE.search(line)]
    outside = [line for line in collectives if "/layers/" not in line]
    assert len(outside) == 1
    sizes = re.search(r"= \w+\[([\d,]+)\]", outside[0]).group(1)
    assert math.prod(map(int, sizes.split(","))) <= 128  # in a tile
    collectives.remove(outside[0])
    assert len(collectives) == 2
    for line, name in zip(collectives, ("attention/output/", "mlp/down/")):
        assert " all-reduce" in line
        assert re.search(rf'op_name="[^"]*/while/body/[^"]*/layers/{name}', line)
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # one writes the tail; one reads each store


@pytest.mark.parametrize(
    ("topology", "axes"),
    [("v5e:1x1", {}), pytest.param("v5e:2x4", {"data": 2, "model": 4}, marks=pytest.mark.thorough)],
)
def test_rows_are_filled_and_go_on_in_place(topology, axes):
    """A row of a running state, several of a smaller bucket, numbers that are data; the loop: no copy of any pool."""
    programs = _programs(topology, **axes)
    mesh, model = programs.mesh, programs.model
    batch = place(model.abstract_batch(2, WORK.prompt, 0), mesh)
    with jax.set_mesh(mesh):
        ctx = jax.eval_shape(lambda p, b: vlc.prefill(model, p, b, POLICY), programs.params, batch)
        ctx = dataclasses.replace(ctx, params={})  # no part of either program
        ctx = abstract(ctx, mesh, specs_of(ctx))
        state = jax.eval_shape(lambda c: vlc.empty_rows(c, WORK.batch, WORK.new_tokens), ctx)
        state = abstract(state, mesh, specs_of(state))
    row = abstract(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    pools = programs.bytes_of((state.kv.context, state.kv.tail))

    def filled(state, ctx, row):
        return vlc.insert(state, row, ctx, 200, sampling=vlc.Sampling(temperature=0.7, top_p=0.9))

    with jax.set_mesh(mesh):
        half = place(model.abstract_batch(2, WORK.prompt // 2, 0), mesh)
        smaller = jax.eval_shape(lambda p, b: Prompt.of(vlc.prefill(model, p, b, POLICY)), programs.params, half)
        smaller = abstract(smaller, mesh, specs_of(smaller))
        options = abstract(jax.eval_shape(lambda: row_options(model.spec, 2, 200)), mesh)
    rows, count = (abstract(jax.ShapeDtypeStruct(shape, jnp.int32), mesh) for shape in ((2,), ()))

    def several(state, prompt, rows, of, count, options):
        return insert_rows(model, state, prompt, rows, of, count, options)

    def run(params, state):
        return vlc.decode_chunk(model, params, state, 16, leave_after=1)

    places = jax.tree.map(lambda x: x.sharding, state)
    for function, arguments, donated in (
        (filled, (state, ctx, row), 0),
        (several, (state, smaller, rows, rows, count, options), 0),
        (run, (programs.params, state), 1),
    ):
        program = compile_on(mesh, function, *arguments, donate=(donated,), out_shardings=places)
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= pools
        assert memory.temp_size_in_bytes < 0.02 * pools


@pytest.mark.thorough
def test_decoding_loop_copies_the_tail_and_no_weights():
    """`generate`'s loop leaves the state valid, so it copies the tail. v5p once transposed all weights."""
    programs = _programs("v5p:1x1x1")
    program, _ = programs.decode(WORK, POLICY)
    state = programs.state(WORK, POLICY)
    assert program.temporary_bytes < programs.bytes_of(state.tail) + 0.02 * programs.bytes_of(state.context)


@pytest.mark.thorough
def test_candidates_bound_the_memory_of_the_prefill():
    """The KV part of a prefill's peak is what it has beyond that of the same forward pass when nothing is kept."""
    programs = _programs("v5p:1x1x1")
    model = programs.model

    def forward(params, batch):
        def attend(query, key, value, carry, layer):
            return ops.attention(vlc.Kernels(), query, key, value, batch.lengths, with_lse=False)[0], carry, None

        variables = {"params": params}
        hidden = model.apply(variables, batch, method="embed").hidden
        positions = jnp.broadcast_to(jnp.arange(batch.length), (batch.size, batch.length))
        layers = jnp.arange(model.spec.num_layers)
        hidden, _, _ = model.apply(variables, hidden, positions, attend, None, layers, method="decode")
        return model.apply(variables, hidden[:, -1], method="unembed")

    compiled = compile_on(programs.mesh, forward, programs.params, programs._batch(WORK), keep_unused=True)
    nothing_kept = compiled.memory_analysis().peak_memory_in_bytes

    def kv_part(policy):
        return programs.prefill(WORK, policy)[0].peak_bytes - nothing_kept

    everything = kv_part(vlc.VLCache(budget=0.1, candidate_fraction=1.0))
    full = 2 * WORK.batch * 32 * 8 * WORK.prompt * 128 * 2  # keys and values of all tokens
    assert 0.9 * full < everything < 1.5 * full
    # Two layers of 32 hand on all they have, the others 40 % of it; a tenth is kept.
    assert kv_part(vlc.VLCache(budget=0.1)) <= 0.65 * full
    assert kv_part(vlc.VLCache(budget=0.1, candidate_fraction=0.2)) <= 0.35 * everything


@pytest.mark.thorough
@pytest.mark.parametrize(
    "policy",
    [vlc.VLCache(budget=0.1, bits=8), vlc.RankedBits(0.25), vlc.RankedBits(), vlc.RankedBits(0.1, repeat=True)],
    ids=["8 bits", "4, 4/2", "8, 4", "4, repeated"],
)
def test_decode_step_over_codes_copies_nothing(policy):
    """As above; the codes are unpacked block by block inside the kernel, that of each store."""
    programs = _programs("v6e:1x1")
    program, compiled = programs.decode_step(WORK, policy)
    assert program.refused is None
    state = programs.state(WORK, policy)
    stores = programs.bytes_of((state.stores, state.tail))
    assert program.alias_bytes >= stores
    assert program.temporary_bytes < 0.05 * stores
    kernels = len(state.stores) + 2  # what was kept, the rest, the answer; one writes the answer
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels
