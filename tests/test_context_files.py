"""Contexts in files: what comes back, and what is refused."""

import dataclasses
import json
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from stub_model import HEAD_DIM, KV_HEADS, LAYERS, StubModel, stub_batch, stub_params

import vlcache_jax as vlc
from vlcache_jax.cache.store import PackedStore, regular_pool
from vlcache_jax.files.tensor_files import TensorFile, write_tensor_file
from vlcache_jax.inference.context_files import KIND
from vlcache_jax.kernels.quantisation import quantise_keys, quantise_values


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
    pool = regular_pool(jnp.ones(shape), 16)
    store = PackedStore.regular(pool, pool, lengths, LAYERS, 16, ctx.next_index)
    following = {"next_position": ctx.next_position + lengths, "next_index": ctx.next_index + lengths}
    return dataclasses.replace(ctx, stores=(*ctx.stores, store), room=16, **following)


def quantised(ctx):
    store, slots = ctx.stores[0], 64 * LAYERS
    x = jnp.ones((ctx.rows, KV_HEADS, slots, HEAD_DIM))
    (keys, key_scales), (values, value_scales) = quantise_keys(x, 4), quantise_values(x, 4)
    offsets = jnp.broadcast_to(64 * jnp.arange(LAYERS)[:, None], store.offsets.shape)
    index = jnp.arange(slots)[None] % 64
    held = index < jnp.repeat(store.lengths[:, :, 0], 64, axis=1)  # of each layer its first positions
    positions = jnp.broadcast_to(jnp.where(held, index, -1)[:, None], (ctx.rows, KV_HEADS, slots))
    packed = PackedStore(keys, values, positions, offsets, store.lengths, key_scales, value_scales, bits=4)
    return dataclasses.replace(ctx, stores=(packed,))


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


def description_of(path):
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(json.loads(raw[8 : 8 + size])["__metadata__"][KIND.name])


def tampered(path, change, kind=KIND):
    """Rewrites the file, checksums and all, after `change(description, arrays)`."""
    file = TensorFile.open(path, KIND)
    description, arrays = dict(file.description), dict(load_file(path))
    change(description, arrays)
    write_tensor_file(path, kind, description, arrays)


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


def both(*changes):
    def change(description, arrays):
        for one in changes:
            one(description, arrays)

    return change


TAMPERED = {
    "stores": (describe(stores=[None, None]), r"'stores.1.positions' is missing"),
    "no stores": (describe(stores=[]), "its stores are of \\[\\] bits"),
    "huge": (describe(stores=10**9), "its stores are of 1000000000 bits"),
    "precision": (describe(stores=["float6"]), "its stores are of .*float6.* bits"),
    "no precision": (describe(stores=[[8]]), "its stores are of"),
    "precise": (describe(stores=[8]), r"'stores.0.keys' is float32 .*, not int8"),
    "room": (describe(room=16), "room for 16 appended tokens"),
    "negative": (describe(room=-1), "its room is -1"),
    "endless": (describe(full_bytes=10**30), "its full_bytes is 1000"),
    "bytes": (describe(full_bytes="many"), "its full_bytes is .many"),
    "policy": (describe(policy=3), "its policy is 3"),
    "budget": (describe(budget={"kind": "Process", "count": 1}), "its budget is"),
    "budget of a list": (describe(budget={"kind": ["Tokens"], "count": 1}), "its budget is"),
    "budget of nothing": (describe(budget=-0.1), "its budget is -0.1"),
    "budget beyond": (describe(budget={"kind": "Mass", "share": 2.0, "cap": 0.1}), "its budget is"),
    "bad budget": (describe(budget={"kind": "Tokens", "count": -1}), "its budget is"),
    "offset": (put("stores.0.offsets", (0, 1), 1 << 20), "offsets reach from 0 to 1048576"),
    "below": (put("stores.0.offsets", (0, 1), -16), "offsets reach from -16"),
    "unaligned": (put("stores.0.offsets", (0, 1), 7), "not multiples of 16"),
    "length": (put("stores.0.lengths", (2, 2), -1), "lengths reach from -1"),
    "end": (put("stores.0.lengths", (2, 2), 90), "ends of segments reach"),
    "overlap": (put("stores.0.offsets", (0, 1), 0), "segments overlap"),
    "position": (put("stores.0.positions", (0, 0, 0), 512), "positions reach from -1 to 512"),
    "future": (put("next_index", 0, 1), "positions are not all below next_index"),
    "twice": (put("stores.0.positions", (0, 0, 1), 0), "positions do not ascend, or one occurs twice"),
    "order": (replace("stores.0.positions", lambda x: x[:, :, ::-1]), "positions (do not ascend|of free slots)"),
    "freed": (put("stores.0.positions", (0, 0, 1), -1), "do not ascend"),
    "nothing": (put("stores.0.positions", (4, 0, 0), -1), "not all below next_index|do not ascend"),
    "free": (put("stores.0.positions", (4, 0, -1), 2), "positions of free slots are not -1"),
    "key": (put("stores.0.keys", (0, 0, 0, 0), np.nan), "keys are not finite"),
    "value": (put("stores.0.values", (1, 1, 1, 2), np.inf), "values are not finite"),
    "density": (put("report.density", (0, 0), np.nan), "density reach from nan"),
    "fraction": (put("report.kept_fraction", 0, -0.5), "kept_fraction reach from -0.5"),
    "stored twice": (
        both(
            describe(stores=[None, None]),
            lambda _, arrays: arrays.update(
                {n.replace(".0.", ".1."): x.copy() for n, x in arrays.items() if n.startswith("stores.0.")}
            ),
        ),
        "two of its stores hold the same position",
    ),
    "next": (put("next_position", 0, 4000), "next_position reach"),
    "logits": (put("logits", (0, 0), np.nan), "logits are not finite"),
    "shape": (replace("stores.0.values", lambda x: x[:, :, :-1]), r"'stores.0.values' is float32 .*, not float32"),
    "rows": (replace("next_position", lambda x: x[:3]), r"'logits' is float32 \[5, 11\], not float32 \[3, \?\]"),
    "dtype": (replace("stores.0.keys", lambda x: x.astype(np.float16)), "'stores.0.keys' is float16"),
    "codes": (replace("stores.0.keys", lambda x: x.astype(np.int8)), "'stores.0.keys' is int8"),
    "kept": (replace("report.kept", lambda x: x[:, :1]), "'report.kept' is int32"),
    "strange": (lambda _, arrays: arrays.update(x=np.zeros(1, np.int64)), r"\['x'\] have no place"),
    "extra": (lambda _, arrays: arrays.update(x=np.zeros(1, np.int32)), r"\['x'\] have no place"),
    "rule": (describe(decoding={"kind": "Evict"}), "its rule for generated tokens is .*Evict"),
    "window": (
        describe(decoding={"kind": "RollingWindow", "tokens": 2**40}),
        "its rule for generated tokens is Rolling",
    ),
    "empty window": (describe(decoding={"kind": "RollingWindow", "tokens": 0}), "its rule .* out of range"),
    "lacking": (lambda _, arrays: arrays.pop("report.exact"), "'report.exact' is missing"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_untrusted_files(ctx, saved, name):
    change, message = TAMPERED[name]
    tampered(saved, change)
    with pytest.raises(vlc.CheckpointError, match=message):
        vlc.load_context(saved, ctx.model, ctx.params)


def test_versions(ctx, saved):
    tampered(saved, lambda *_: None, dataclasses.replace(KIND, version=2))
    with pytest.raises(
        vlc.CheckpointError, match=r"format version 2, this library reads version 6.*precision of each store.*again"
    ):
        vlc.load_context(saved, ctx.model, ctx.params)


def rewritten(path, change):
    """Rewrites the header after `change(header)`, leaving checksums as they are."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    data = raw[8 + size :]
    data = change(header, data) or data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def set_of(name, **values):
    return lambda header, _: header[name].update(values)


def set_metadata(change):
    def rewrite(header, _):
        text = header["__metadata__"][KIND.name]
        header["__metadata__"][KIND.name] = change(text)

    return rewrite


HEADERS = {
    "74 axes": (set_of("logits", shape=[1] * 74), "'logits' is described as"),
    "64 axes": (set_of("logits", shape=[1] * 64), "described as"),
    "an endless axis": (set_of("logits", shape=[10**30, 0], data_offsets=[0, 0]), "'logits' is described as"),
    "negative": (set_of("logits", shape=[-5, -11]), "'logits' is described as"),
    "a text": (set_of("logits", shape="555"), "described as"),
    "another type": (set_of("next_position", dtype="F32"), "'next_position' has not the checksum"),
    "another shape": (set_of("report.kept", shape=[3, 5]), "'report.kept' has not the checksum"),
    "too long": (lambda _, data: data + b"\0", "something was appended"),
    "too short": (lambda _, data: data[:-1], "truncated"),
    "a bit": (lambda _, data: data[:-1] + bytes([data[-1] ^ 1]), "has not the checksum"),
    "overlapping": (set_of("logits", data_offsets=[0, 220]), "starts at byte|cannot fill"),
    "a budget": (
        set_metadata(lambda text: text.replace('"budget": 0.4', '"budget": 0.9')),
        "description has not",
    ),
    "a key twice": (set_metadata(lambda text: text[:-1] + ', "room": 1}'), '"room" occurs twice'),
    "not a number": (set_metadata(lambda text: text.replace('"room": 0', '"room": NaN')), "room is nan"),
    "400 digits": (
        set_metadata(lambda text: text.replace('"room": 0', '"room": ' + "1" * 400)),
        "room is 11111.*at most 40 digits",
    ),
    "no checksums": (set_metadata(lambda text: text.replace("checksums", "checksomes")), "checksum"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_headers(ctx, saved, name):
    change, message = HEADERS[name]
    before = saved.read_bytes()
    rewritten(saved, change)
    assert saved.read_bytes() != before
    with pytest.raises(vlc.CheckpointError, match=message):
        vlc.load_context(saved, ctx.model, ctx.params)


def test_every_single_bit_is_checked(ctx, saved):
    """300 random bits, and every bit of the first 300 bytes of the header."""
    raw = bytearray(saved.read_bytes())
    rng = np.random.default_rng(0)
    bits = [*rng.choice(8 * len(raw), 300, replace=False).tolist(), *range(8 * 40)]
    for bit in bits:
        raw[bit // 8] ^= 1 << bit % 8
        saved.write_bytes(raw)
        with pytest.raises(vlc.VLCacheError, match=str(saved)):
            vlc.load_context(saved, ctx.model, ctx.params)
        raw[bit // 8] ^= 1 << bit % 8
    saved.write_bytes(raw)
    vlc.load_context(saved, ctx.model, ctx.params)


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_nobody_waits_for_what_is_no_plain_file(ctx, tmp_path, kind):
    path = tmp_path / "context"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = "/dev/zero"
    errors = []

    def load():
        try:
            vlc.load_context(path, ctx.model, ctx.params)
        except vlc.CheckpointError as error:
            errors.append(str(error))

    reading = threading.Thread(target=load, daemon=True)
    reading.start()
    reading.join(timeout=60)
    assert "not a plain file" in errors[0]
    with pytest.raises(vlc.InputError, match="not a plain file"):
        vlc.save_context(ctx, path)


def test_saving_again_replaces_the_file_and_no_link(ctx, saved, tmp_path):
    vlc.save_context(ctx, saved)
    (tmp_path / "link").symlink_to(saved)
    with pytest.raises(vlc.InputError, match="is a link to"):
        vlc.save_context(ctx, tmp_path / "link")
    vlc.load_context(tmp_path / "link", ctx.model, ctx.params)


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
