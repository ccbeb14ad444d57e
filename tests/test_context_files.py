"""Contexts in files: what comes back, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stub_model import HEAD_DIM, KV_HEADS, LAYERS, StubModel, stub_batch, stub_params

import vlcache_jax as vlc
from vlcache_jax.context_files import FORMAT
from vlcache_jax.extending import _store
from vlcache_jax.kernels.quantisation import quantise_keys, quantise_values
from vlcache_jax.state import PackedStore


def make(dtype="float32", policy=None, **model):
    batch = stub_batch()
    params = stub_params(batch, dtype=dtype)
    return vlc.compress(StubModel(dtype, **model), params, batch, policy or vlc.VLCache(budget=0.4))


@pytest.fixture(scope="module")
def ctx():
    return make()


@pytest.fixture
def saved(ctx, tmp_path):
    path = tmp_path / "context.safetensors"
    vlc.save_context(ctx, path)
    return path


def with_a_turn(ctx):
    """`ctx` with an appended store, as `extend` makes it (the stub embeds no tokens)."""
    shape = (ctx.rows, KV_HEADS, LAYERS, 4, HEAD_DIM)
    lengths = jnp.array([1, 4, 2, 3, 4])
    store = _store(jnp.ones(shape), jnp.ones(shape), ctx.next_position, lengths, 16)
    return dataclasses.replace(ctx, stores=(*ctx.stores, store), next_position=ctx.next_position + lengths, room=16)


def quantised(ctx):
    store, slots = ctx.stores[0], 64 * LAYERS
    x = jnp.ones((ctx.rows, KV_HEADS, slots, HEAD_DIM))
    (keys, key_scales), (values, value_scales) = quantise_keys(x, 4), quantise_values(x, 4)
    offsets = jnp.broadcast_to(64 * jnp.arange(LAYERS)[:, None], store.offsets.shape)
    positions = jnp.zeros((ctx.rows, KV_HEADS, slots), jnp.int32)
    packed = PackedStore(keys, values, positions, offsets, store.lengths, key_scales, value_scales)
    return dataclasses.replace(ctx, stores=(packed, store))


@pytest.mark.parametrize("change", [lambda c: c, with_a_turn, quantised], ids=["plain", "a turn", "quantised"])
@pytest.mark.parametrize("policy", [vlc.VLCache(budget=0.4), vlc.SnapKV(budget=40), vlc.H2O(budget=vlc.Bytes(9000))])
def test_round_trip(change, policy, tmp_path):
    ctx = change(make(policy=policy))
    vlc.save_context(ctx, tmp_path / "c")
    back = vlc.load_context(tmp_path / "c", ctx.model, ctx.params)
    assert jax.tree.structure(back) == jax.tree.structure(ctx)  # static parts: model, room, policy, budget, bytes
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(ctx)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_bfloat16(tmp_path):
    ctx = make("bfloat16")
    vlc.save_context(ctx, tmp_path / "c")
    back = vlc.load_context(tmp_path / "c", ctx.model, ctx.params)
    assert back.stores[0].keys.dtype == jnp.bfloat16
    np.testing.assert_array_equal(back.stores[0].keys, ctx.stores[0].keys)


def test_other_programs_read_it(ctx, saved):
    np.testing.assert_array_equal(load_file(saved)["stores.0.keys"], ctx.stores[0].keys)


@dataclasses.dataclass(frozen=True)
class Longer(StubModel):
    @property
    def spec(self):
        return dataclasses.replace(super().spec, max_positions=1024, num_kv_heads=4)


def test_another_model_is_refused_with_both_sides_named(ctx, saved):
    with pytest.raises(vlc.InputError, match=r"num_kv_heads=2, max_positions=512, .*has num_kv_heads=4, max_pos.*1024"):
        vlc.load_context(saved, Longer(), ctx.params)
    with pytest.raises(
        vlc.InputError, match=r"saved for a model with dtype=float32, but this model has dtype=bfloat16"
    ):
        vlc.load_context(saved, StubModel("bfloat16"), ctx.params)
    tuned = {**ctx.params, "key": ctx.params["key"] + 0.001}
    with pytest.raises(vlc.InputError, match=r"with parameters=\w{40}, but this model has parameters=\w{40}"):
        vlc.load_context(saved, ctx.model, tuned)


def tampered(path, change):
    """Rewrites the file after `change(description, arrays)`."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    description = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"][FORMAT])
    arrays = dict(load_file(path))
    change(description, arrays)
    save_file(arrays, path, metadata={FORMAT: json.dumps(description)})


def put(name, index, value):
    def change(_, arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return change


def replace(name, function):
    def change(_, arrays):
        arrays[name] = np.ascontiguousarray(function(arrays[name]))

    return change


def describe(**values):
    return lambda description, _: description.update(values)


TAMPERED = {
    "version": (describe(version=2), "format version 2, this library reads version 1"),
    "stores": (describe(stores=2), r"'stores.1.keys' is missing"),
    "no stores": (describe(stores=0), "claims 0 stores"),
    "huge": (describe(stores=10**9), "claims 1000000000 stores"),
    "room": (describe(room=16), "room for 16 appended tokens"),
    "negative": (describe(room=-1), "its room is -1"),
    "bytes": (describe(full_bytes="many"), "its full_bytes is 'many'"),
    "policy": (describe(policy=3), "its policy is 3"),
    "budget": (describe(budget={"kind": "Process", "count": 1}), "its budget is"),
    "bad budget": (describe(budget={"kind": "Tokens", "count": -1}), "its budget is"),
    "offset": (put("stores.0.offsets", (0, 1), 1 << 20), "offsets reach from 0 to 1048576"),
    "below": (put("stores.0.offsets", (0, 1), -16), "offsets reach from -16"),
    "unaligned": (put("stores.0.offsets", (0, 1), 7), "not multiples of 16"),
    "length": (put("stores.0.lengths", (2, 2), -1), "lengths reach from -1"),
    "end": (put("stores.0.lengths", (2, 2), 90), "ends of segments reach"),
    "position": (put("stores.0.positions", (0, 0, 0), 512), "positions reach from -1 to 512"),
    "next": (put("next_position", 0, 4000), "next_position reach"),
    "logits": (put("logits", (0, 0), np.nan), "logits are not finite"),
    "shape": (replace("stores.0.values", lambda x: x[:, :, :-1]), r"'stores.0.values' is float32 .*, not float32"),
    "rows": (replace("next_position", lambda x: x[:3]), r"'logits' is float32 \[5, 11\], not float32 \[3, \?\]"),
    "dtype": (replace("stores.0.keys", lambda x: x.astype(np.float16)), "'stores.0.keys' is float16"),
    "codes": (replace("stores.0.keys", lambda x: x.astype(np.int8)), "'stores.0.values' is float32"),
    "kept": (replace("report.kept", lambda x: x[:, :1]), "'report.kept' is int32"),
    "strange": (lambda _, arrays: arrays.update(x=np.zeros(1, np.int64)), "dtype I64"),
    "extra": (lambda _, arrays: arrays.update(x=np.zeros(1, np.int32)), r"\['x'\] have no place"),
    "lacking": (lambda _, arrays: arrays.pop("report.exact"), "'report.exact' is missing"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_untrusted_files(ctx, saved, name):
    change, message = TAMPERED[name]
    tampered(saved, change)
    with pytest.raises(vlc.CheckpointError, match=message):
        vlc.load_context(saved, ctx.model, ctx.params)


def test_other_files(ctx, saved, tmp_path):
    with pytest.raises(vlc.CheckpointError, match="cannot be read"):
        vlc.load_context(tmp_path / "nothing", ctx.model, ctx.params)
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(vlc.CheckpointError, match="not a valid safetensors file"):
        vlc.load_context(saved, ctx.model, ctx.params)
    (tmp_path / "empty").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(vlc.CheckpointError, match="holds no context"):
        vlc.load_context(tmp_path / "empty", ctx.model, ctx.params)
    with pytest.raises(vlc.InputError, match="cannot be written"):
        vlc.save_context(ctx, tmp_path / "no" / "folder")
