"""What a mesh leaves whole is said: in the report, in the plan, and once as a warning."""

import warnings

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.parallel.replication import replicated, warn

SPEC = tiny_llava()[0].spec  # 2 KV heads
ADA = vlc.AdaKV(budget=0.5, window=1)

CASES = [
    ({}, {"rows": 3}, None),
    ({"data": 8}, {"rows": 8}, None),
    ({"data": 8}, {"rows": 1}, None),
    ({"data": 4, "model": 2}, {"rows": 4, "lanes": vlc.VLCache().shared_lanes}, None),
    ({"replica": 2, "data": 2, "model": 2}, {"rows": 4}, None),
    ({"data": 2, "model": 1}, {"rows": 4, "lanes": ADA.shared_lanes, "policy": ADA.name}, None),
    ({"x": 1}, {}, None),
    ({"dp": 2, "tp": 2}, {}, r"axes 'dp', 'tp', none of them 'model'.*name the axis"),
    ({"tensor": 8}, {}, r"none of them 'model'"),
    ({"data": 2, "Model": 2}, {}, r"'Model', none of them 'model'"),
    ({"data": 1, "model": 4}, {}, r"2 KV heads do not divide over the 4 devices of axis 'model'.*divisor of 2"),
    (
        {"data": 1, "model": 2},
        {"lanes": ADA.shared_lanes, "policy": ADA.name},
        r"ada_kv with lanes=1 .* 2 devices.*lanes=2",
    ),
    ({"data": 4, "model": 2}, {"rows": 6}, r"6 rows do not divide over the 4 devices of 'data'.*multiple of 4"),
    ({"a": 2, "b": 2, "model": 2}, {"rows": 6}, r"6 rows .* 4 devices of 'a' and 'b'"),
]


@pytest.mark.parametrize(("axes", "options", "message"), CASES)
def test_notes(axes, options, message):
    notes = replicated(axes, SPEC, **options)
    if message is None:
        assert notes == ()
    else:
        with pytest.warns(vlc.PlacementWarning, match=message):
            warn(notes)


def test_head_adaptive_lanes_that_divide_and_a_whole_cache_are_split():
    assert replicated({"model": 2}, SPEC, lanes=vlc.AdaKV(budget=0.5, window=1, lanes=2).shared_lanes) == ()
    assert replicated({"model": 2}, SPEC, lanes=vlc.AdaKV(budget=1.0, window=4).shared_lanes) == ()


def test_the_report_says_what_is_so():
    """A store of one lane lies whole on both devices; the report and a warning say so."""
    model, params = tiny_llava(layers=1)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)
    placed = jax.device_put(params, param_shardings(model.abstract_params(), mesh))
    batch = jax.device_put(ragged_batch(rows=2, length=16, tiles=1), NamedSharding(mesh, PartitionSpec("data")))
    with pytest.warns(vlc.PlacementWarning, match="ada_kv with lanes=1"):
        context = vlc.compress(model, placed, batch, ADA)
    assert context.stores[0].keys.sharding.spec[1:2] in ((), (None,))
    assert len(context.report.replicated) == 1
    assert "lanes=1" in context.report.replicated[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = vlc.compress(model, placed, batch, vlc.AdaKV(budget=0.5, window=1, lanes=2))
    assert split.report.replicated == ()
    assert split.stores[0].keys.sharding.spec[1] == "model"
    np.testing.assert_array_equal(split.report.kept_fraction, context.report.kept_fraction)
