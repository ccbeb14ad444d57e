"""The planner: its numbers are the compiler's, its searches end, its presets are the published models."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from tpu import compile_for

import vlcache_jax as vlc
from vlcache_jax.errors import InputError
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.llava.presets import PRESETS
from vlcache_jax.models.families.registry import preset
from vlcache_jax.models.vision.config import VisionConfig
from vlcache_jax.planning.chips import CHIPS
from vlcache_jax.planning.placement import check_axes, default_axes
from vlcache_jax.planning.programs import Program, Programs, Workload
from vlcache_jax.planning.search import Limit, largest
from vlcache_jax.planning.topologies import make_mesh, tpu_devices
from vlcache_jax.terminal.progress import Progress


def _config(**decoder) -> LlavaConfig:
    sizes = {
        "family": "llama",
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 128,
        "max_positions": 512,
    }
    return LlavaConfig(
        model_type="llava",
        vision=VisionConfig(
            hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=28, patch_size=14
        ),
        decoder=DecoderConfig(**(sizes | decoder)),
        image_token_id=5,
        feature_layers=(1,),
        eos_token_ids=(2,),
    )


# --- presets ---


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llava-1.5-7b", 7_063_427_072),
        ("llava-v1.6-mistral-7b", 7_566_747_648),
        ("llava-v1.6-34b", 34_752_083_968),  # the hub rounds it to 34.8B
    ],
)
def test_parameters_are_the_published_ones(name, published):
    config = preset(name)
    params = Llava(config).abstract_params()
    ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    # A checkpoint also holds CLIP's last layer and its final norm, which never reach the features.
    width, wide = config.vision.hidden_size, config.vision.intermediate_size
    layer = 4 * (width * width + width) + 2 * width * wide + wide + width + 4 * width
    assert ours + layer + 2 * width == published


def test_presets_by_name():
    assert preset("llava-1.5-7b") is PRESETS["llava-1.5-7b"]
    with pytest.raises(InputError, match=r"use one of llava-v1.6-mistral-7b, "):
        preset("llava-1.6-mistral-7b")


# --- mesh ---


@pytest.mark.parametrize(
    ("devices", "kv_heads", "axes"),
    [(1, 8, (1, 1)), (8, 8, (1, 8)), (16, 8, (2, 8)), (4, 32, (1, 4)), (8, 4, (2, 4)), (4, 6, (2, 2))],
)
def test_default_axes(devices, kv_heads, axes):
    found = default_axes(devices, kv_heads)
    assert tuple(found.values()) == axes
    assert check_axes(found, devices, kv_heads, batch=16) == found


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 8}, "use data"),
        ({"model": 4}, "try data=1,model=8"),
        ({"model": 0, "data": 8}, "their product must"),
        ({"data": 8}, "cannot be split over 8 groups"),
    ],
)
def test_wrong_axes(axes, message):
    with pytest.raises(InputError, match=message):
        check_axes(axes, 8, kv_heads=8, batch=4)


def test_axes_that_split_heads():
    with pytest.raises(InputError, match="2 KV heads cannot be split 4 ways; try data=2,model=2"):
        check_axes({"model": 4}, 4, kv_heads=2, batch=4)


# --- search ---


def _search(peak, start=8, available=1000, **options):
    """`peak` bytes of a size; returns the limit and the sizes that were compiled."""
    asked = []

    def compile_size(n):
        asked.append(n)
        return peak(n) <= available, peak(n)

    first = (peak(start) <= available, peak(start))
    settings = {"fixed_bytes": 100, "available_bytes": available, "step": 1, "ceiling": 4096, "max_compilations": 8}
    return largest(compile_size, start, known=first, **(settings | options)), asked


@pytest.mark.parametrize("slope", [1, 3, 7, 50])
@pytest.mark.parametrize("bend", [0.0, 0.002])
def test_search_finds_the_limit(slope, bend):
    def peak(n):
        return int(100 + slope * n + bend * slope * n * n)

    limit, asked = _search(peak, max_compilations=20)
    assert peak(limit.fits) <= 1000 < peak(limit.refused)
    assert limit.refused - limit.fits <= max(1, limit.fits // 32)
    assert limit.compilations == len(asked) == len(set(asked))
    assert len(asked) <= 6


def test_search_from_above():
    limit, _ = _search(lambda n: 100 + 50 * n, start=64)
    assert (limit.fits, limit.refused) == (18, 19)


def test_search_where_nothing_fits():
    limit, asked = _search(lambda n: 2000 + n)
    assert limit.fits is None
    assert limit.refused == min(asked)


def test_search_stops_at_the_ceiling():
    limit, asked = _search(lambda n: 100 + n, ceiling=40)
    assert limit == Limit(fits=40, refused=None, compilations=1)
    assert asked == [40]


def test_search_keeps_to_steps_and_to_its_bound():
    limit, asked = _search(lambda n: 100 + n // 7, start=64, step=64, ceiling=10_000, max_compilations=2)
    assert all(n % 64 == 0 for n in asked)
    assert limit.compilations <= 2


def test_search_without_peaks():
    limit = largest(
        lambda n: (n <= 37, None),
        8,
        known=(True, None),
        fixed_bytes=0,
        available_bytes=1,
        step=1,
        ceiling=1000,
        max_compilations=20,
    )
    assert (limit.fits, limit.refused) == (37, 38)


def test_search_that_is_led_too_far_and_measures_no_refusal():
    """As the compiler does it: the line promises 21,504, and a refusal does not say how much would be needed."""
    limit = largest(
        lambda n: (n <= 18_000, 7200 if n <= 8192 else 14_000 if n <= 18_000 else None),
        8192,
        known=(True, 7200),
        fixed_bytes=2000,
        available_bytes=15_650,
        step=128,
        ceiling=32_512,
        max_compilations=5,
    )
    assert 16_000 <= limit.fits <= 18_000 < limit.refused


# --- the numbers are the compiler's ---


def _programs(topology: str, **axes: int) -> Programs:
    mesh = make_mesh(tpu_devices(topology), {"data": 1, "model": 1} | axes)
    return Programs(Llava(_config(), jnp.dtype("bfloat16")), mesh)


@pytest.fixture(scope="module")
def programs() -> Programs:
    return _programs("v5e:1x1")


WORK = Workload(batch=4, prompt=64, new_tokens=16, tiles=1)


def test_memory_is_the_compilers(programs):
    program, compiled = programs.decode_step(WORK, vlc.FullCache())
    memory = compiled.memory_analysis()
    assert program.argument_bytes == memory.argument_size_in_bytes
    assert program.temporary_bytes == memory.temp_size_in_bytes
    assert program.alias_bytes == memory.alias_size_in_bytes
    assert program.peak_bytes == memory.peak_memory_in_bytes
    assert program.peak_bytes >= program.argument_bytes
    # Arguments are the parts that the plan lists, but for the tokens.
    state = programs.state(WORK, vlc.FullCache())
    parts = programs.bytes_of(programs.params) + programs.bytes_of(state)
    assert 0 <= program.argument_bytes - parts <= 4096
    assert program.alias_bytes >= programs.bytes_of((state.context, state.tail))


def test_state_is_split_over_both_axes():
    programs = _programs("v5e:2x2", data=2, model=2)
    state = programs.state(WORK, vlc.VLCache(budget=0.5))
    assert state.context.keys.sharding.spec == state.tail.values.sharding.spec == P("data", "model")
    assert state.context.offsets.sharding.spec == P("data")
    stores = (state.context.keys, state.context.values)
    assert programs.bytes_of(stores) == sum(x.size * 2 for x in stores) // 4


def test_pruned_layers_hold_what_goes_on(programs):
    pruning = vlc.PyramidDrop((1,), (0.5,), rooms=(32,))
    whole, pruned = (programs.state(WORK, vlc.Recipe(pruning=p)).context.keys.shape for p in (None, pruning))
    layers = programs.model.spec.num_layers
    assert whole[2] - pruned[2] == (layers - 1) * (64 - 32)


@pytest.mark.parametrize("chip", CHIPS)
def test_available_memory_is_just_below_the_published(chip):
    topology = f"{chip}:{'x'.join(['2', '2', '1'][: CHIPS[chip].axes])}"
    programs = _programs(topology)
    published = CHIPS[chip].hbm_bytes / CHIPS[chip].devices
    assert 0.9 * published < programs.available_bytes() <= 1.01 * published


def test_a_program_that_does_not_fit(programs):
    work = Workload(batch=2, prompt=256, new_tokens=2**24, tiles=0)
    program, compiled = programs.decode_step(work, vlc.FullCache())
    assert compiled is None
    assert program.out_of_memory
    assert program.temporary_bytes is None


def test_plan(capsys):
    found = vlc.plan(
        _config(),
        "v5e:1x1",
        batch=2,
        prompt=64,
        new_tokens=16,
        policy=vlc.VLCache(budget=0.5),
        compare=[vlc.FullCache()],
        search=False,
        progress=Progress(),
    )
    ours, full = found.policies
    assert ours.fits
    assert full.fits
    assert ours.context_bytes < full.context_bytes
    assert ours.tail_bytes == full.tail_bytes
    for policy in found.policies:
        assert policy.peak_bytes == max(policy.prefill.peak_bytes, policy.decode.peak_bytes)
        bound = found.batch * found.hbm_bytes_per_second / policy.step_read_bytes
        assert policy.bound_tokens_per_second == pytest.approx(bound)
    assert found.mesh == {"data": 1, "model": 1}
    lines = capsys.readouterr().err.splitlines()
    assert sum("compiled in" in line for line in lines) == 6
    assert sum("] compiling: " in line for line in lines) == 6  # said before it begins
    assert json.loads(json.dumps(found.as_dict()))["policies"][0]["budget"] == 0.5


def test_plan_searches(monkeypatch):
    """Both searches, with a compiler that says: 1 GiB a row and 4 MiB a token and row."""
    compiled = []

    def compile_(_, work, policy):
        compiled.append((work.batch, work.prompt))
        return Program(peak_bytes=work.batch * (2**30 + work.prompt * 2**22), compile_seconds=0.0), None

    for name in ("prefill", "decode", "decode_step"):
        monkeypatch.setattr(Programs, name, compile_)
    found = vlc.plan(_config(max_positions=4096), "v5e:1x1", prompt=256, new_tokens=32, images=0)
    policy = found.policies[0]
    assert (policy.largest_batch.fits, policy.largest_batch.refused) == (7, 8)  # 15.75 GiB, 2 GiB a row
    # 3776 tokens would fit: within a step (128) of it
    assert 3584 <= policy.longest_prompt.fits <= 3712
    assert 0 < policy.longest_prompt.refused - policy.longest_prompt.fits <= 128
    assert len(compiled) <= 3 + 4 * 5
    found = vlc.plan(_config(max_positions=1000), "v5e:1x1", prompt=256, new_tokens=32, images=0)
    assert found.policies[0].longest_prompt == Limit(fits=896, refused=None, compilations=1)
    found = vlc.plan(_config(), "v5e:1x1", prompt=256, images=0, search=False)
    assert found.policies[0].largest_batch is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch=0 must be"),
        ({"prompt": True}, "prompt=True must be"),
        ({"prompt": 500, "new_tokens": 20}, "need 520 positions but the model has 512"),
        ({"images": -1}, "images=-1"),
        ({"max_image_tokens": 64}, "llava resizes images to sizes of its own: leave max_image_tokens out"),
        ({"model": "qwen3-vl-4b", "max_image_tokens": 0}, "max_image_tokens=0 must be"),
        ({"dtype": "int8"}, "use one of bfloat16"),
        ({"mesh": {"model": 3}}, "their product must"),
        ({"policy": vlc.Recipe(pruning=vlc.PyramidDrop())}, "has no rooms: say how many tokens"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        vlc.plan(**({"model": _config(), "topology": "v5e:2x2", "prompt": 64} | arguments))


def test_images_of_so_many_tokens(monkeypatch):
    """Four patches of Qwen-VL are a token."""
    seen = []

    def compile_(_, work, policy):
        seen.append(work.tiles)
        return Program(peak_bytes=2**30, compile_seconds=0.0), None

    for name in ("prefill", "decode", "decode_step"):
        monkeypatch.setattr(Programs, name, compile_)
    vlc.plan("qwen3-vl-2b", "v5e:1x1", images=2, max_image_tokens=256, prompt=1024, search=False)
    assert set(seen) == {2048}


def test_refused_for_another_reason(programs, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("kernels cannot be partitioned\nmore")

    monkeypatch.setattr("vlcache_jax.planning.programs.compile_on", refuse)
    program, _ = programs.prefill(WORK, vlc.FullCache())
    assert program.refused == "kernels cannot be partitioned"
    assert not program.out_of_memory


def test_compile_for_agrees_with_the_planner(programs):
    """The helper of the tests and the planner compile alike."""
    compiled = compile_for("v5e:2x2", lambda x: x * 2, jax.ShapeDtypeStruct((256, 256), "bfloat16"), axes={"model": 4})
    assert compiled.memory_analysis().argument_size_in_bytes == 256 * 256 * 2
