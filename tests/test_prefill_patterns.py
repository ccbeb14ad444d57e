"""Every pattern of a sparse prefill against its formula in plain numpy, one row at a time, on ragged batches."""

import dataclasses
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prefill_references import a_shape, flex_prefill, m_inference, moved_grid, tri_shape, x_attention

import vlcache_jax as vlc
from vlcache_jax.parallel import ops
from vlcache_jax.patterns.grammar import pattern_by_name
from vlcache_jax.patterns.listing import lists_of, moved_lists_of
from vlcache_jax.patterns.maps import diagonals
from vlcache_jax.patterns.pattern import PatternInputs, with_last_rows
from vlcache_jax.patterns.visual_grid import visual_strides
from vlcache_jax.pruning.stage import Stage

LENGTH, LENGTHS, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 200, [200, 137, 64, 5], 4, 2, 8, 8
FIRST, STRIDES = 10, (6, 30)  # the first visual token; visual ones end 20 before the prompt does
SMALL = {"min_tokens": 0, "block": BLOCK}
TABLE = (
    (("vertical_and_slash", 40, 120), ("stream_llm", 9, 30), ("block_sparse", 1, 1), ("vertical_and_slash", 35, 104)),
    (("block_sparse", 1, 1), ("stream_llm", 20, 3)),
)


@cache
def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (len(LENGTHS), LENGTH, HEADS, HEAD_DIM), (len(LENGTHS), LENGTH, KV_HEADS, HEAD_DIM)
    query, key = (1.5 * rng.normal(size=shape).astype(np.float32) for shape in shapes)
    index = np.arange(LENGTH)
    vision = (index >= FIRST) & (index < np.asarray(LENGTHS)[:, None] - 20)
    return PatternInputs(
        query=query,
        key=key,
        lengths=np.asarray(LENGTHS, np.int32),
        vision=vision,
        layer=np.int32(0),
        heads=np.arange(HEADS, dtype=np.int32),
        grid=np.broadcast_to(np.asarray(STRIDES, np.int32), (len(LENGTHS), 2)),
        block=BLOCK,
    )


def run(pattern, given):
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    block = fields.pop("block")

    def choose(fields):
        made = with_last_rows(pattern, PatternInputs(block=block, **fields))
        return lists_of(pattern, made, pattern.choose(made))

    return jax.jit(choose)({name: x for name, x in fields.items() if x is not None})


def maps_of(lists):
    """bool [batch, list heads, blocks, blocks] of lists; and single columns bool [batch, list heads, length]."""
    ids, counts = np.asarray(lists.ids), np.asarray(lists.counts)
    found = np.zeros((*counts.shape, counts.shape[2]), bool)
    for place in np.ndindex(*counts.shape):
        chosen = ids[place][: counts[place]]
        assert (np.diff(chosen) > 0).all()
        found[(*place, chosen)] = True
    single = np.zeros((*counts.shape[:2], LENGTH + 1), bool)
    if lists.loose is not None:
        for place in np.ndindex(*counts.shape[:2]):
            single[(*place, np.asarray(lists.loose)[place])] = True
    return found, single[..., :LENGTH]


PATTERNS = {
    "a_shape": (vlc.AShape(9, 30, **SMALL), lambda *x: a_shape(x, 9, 30)),
    "tri_shape": (vlc.TriShape(9, 30, 12, **SMALL), lambda *x: tri_shape(x, 9, 30, 12)),
    "x_attention": (vlc.XAttention(0.8, 4, **SMALL), lambda *x: x_attention(x, 0.8, 4)),
    "flex_vertical": (vlc.FlexPrefill(0.7, 0, 16, **SMALL), lambda *x: flex_prefill(x, 0.7, 0, 16)),
    "flex_both": (vlc.FlexPrefill(0.7, 0.33, 16, **SMALL), lambda *x: flex_prefill(x, 0.7, 0.33, 16)),
    "m_inference": (vlc.MInference(TABLE, **SMALL), lambda *x: m_inference(x, TABLE[0])),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_each_head_is_the_formula(name):
    pattern, reference = PATTERNS[name]
    given, block = inputs(), BLOCK
    lists, told = run(dataclasses.replace(pattern, heads="each"), given)
    found, single = maps_of(lists)
    kinds = set()
    for b, length in enumerate(LENGTHS):
        blocks = -(-length // block)
        of_all = blocks * (blocks + 1) / 2
        for h in range(HEADS):
            arrays = given.query[b, :length, h], given.key[b, :length, h * KV_HEADS // HEADS]
            keep, columns = reference(*arrays, given.vision[b, :length], block, h)
            np.testing.assert_array_equal(found[b, h, :blocks, :blocks], np.tril(keep | np.eye(blocks, dtype=bool)))
            assert not found[b, h, blocks:].any()
            np.testing.assert_array_equal(np.flatnonzero(single[b, h]), columns)
            listed = found[b, h].sum() + sum(blocks - j // block for j in columns) / block
            np.testing.assert_allclose(told.density[b, h], listed / of_all, rtol=1e-5)
            kinds.add(bool(keep.all()))
    np.testing.assert_array_equal(told.overflow, 0)
    assert False in kinds, "the case is none: everything is listed"


@pytest.mark.parametrize(
    ("boundary", "interleaved"), [("query", False), pytest.param("none", True, marks=pytest.mark.thorough)]
)
def test_mm_inference_moves_tokens(boundary, interleaved):
    """Who sees whom, and the attention of it, with text in front and behind, or also in front of every frame."""
    given, window = inputs(), 12
    if interleaved:
        given = dataclasses.replace(given, vision=given.vision & ((np.arange(LENGTH) - FIRST) % STRIDES[1] > 2))
    pattern = vlc.MMInference(window, boundary, heads="each", **SMALL)
    value = np.random.default_rng(3).normal(size=given.key.shape).astype(np.float32)

    @jax.jit
    def attend(query, key, value):
        def choose(query, key, heads, per_row):
            made = dataclasses.replace(given, query=query, key=key)
            chosen = pattern.choose(made)
            lists, others = lists_of(pattern, made, chosen), moved_lists_of(pattern, made, chosen.moved)
            moved = chosen.moved
            return lists[0], (moved.order, moved.back, others[0]), (moved.back, moved.limits, lists, others)

        return ops.sparse_attention(vlc.Kernels(), choose, query, key, value, ())

    out, (back, limit, (lists, told), (others, more)) = attend(given.query, given.key, value)
    (near, _), (blocks, _) = maps_of(lists), maps_of(others)
    np.testing.assert_array_equal(told.overflow + more.overflow, 0)
    for b, length in enumerate(LENGTHS):
        for h in range(HEADS):
            query, key = given.query[b, :length, h], given.key[b, :length, h * KV_HEADS // HEADS]
            seen = moved_grid((query, key, given.vision[b, :length], BLOCK, h), window, boundary, STRIDES)
            place, limits = np.asarray(back[b, h, :length]), np.asarray(limit[b, :length])
            index = np.arange(length)
            first = near[b, h][index // BLOCK][:, index // BLOCK] & (index <= index[:, None])
            second = blocks[b, h][place // BLOCK][:, place // BLOCK] & (index < limits[:, None])
            assert not (first & second).any()
            np.testing.assert_array_equal(first | second, seen)
            assert b or seen.sum() < 0.75 * length * (length + 1) / 2
            logits = np.where(seen, query @ key.T * HEAD_DIM**-0.5, -np.inf)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            wanted = weights / weights.sum(axis=1, keepdims=True) @ value[b, :length, h * KV_HEADS // HEADS]
            np.testing.assert_allclose(out[b, :length, h], wanted, atol=1e-5)


@pytest.mark.thorough
def test_lists_of_moved_tokens_keep_the_latest_where_room_ends():
    given = inputs()
    some, all_ = (vlc.MMInference(12, capacity=capacity, **SMALL) for capacity in (0.2, 1.0))
    (few, less), (whole, _) = (moved_lists_of(x, given, x.choose(given).moved) for x in (some, all_))
    (found, _), (wanted, _) = maps_of(few), maps_of(whole)
    assert few.ids.shape[3] == 5
    np.testing.assert_array_equal(found.sum(axis=3), np.minimum(wanted.sum(axis=3), 5))
    np.testing.assert_array_equal(less.overflow, (wanted & ~found).sum(axis=(2, 3)))
    latest = np.asarray(few.order.places).reshape(*found.shape[:3], BLOCK)
    latest = np.where(latest < np.asarray(LENGTHS)[:, None, None, None], latest, -1).max(axis=3)
    for place in np.argwhere(wanted.sum(axis=3) > 5):
        of_list = latest[tuple(place[:2])]
        kept, left = (x[tuple(place)] for x in (found, wanted & ~found))
        assert of_list[kept].min() >= of_list[left].max()


@pytest.mark.parametrize("name", ["x_attention", "flex_both", "a_shape"])
def test_a_group_sees_what_any_of_its_heads_wants(name):
    pattern, _ = PATTERNS[name]
    each, _ = maps_of(run(dataclasses.replace(pattern, heads="each"), inputs())[0])
    group, _ = maps_of(run(pattern, inputs())[0])
    np.testing.assert_array_equal(group, each.reshape(len(LENGTHS), KV_HEADS, -1, *each.shape[2:]).any(axis=2))


def test_a_group_of_m_inference_adds_sums_before_it_ranks():
    pattern = vlc.MInference(TABLE, **SMALL)
    given = inputs()
    found, single = maps_of(run(pattern, given)[0])
    for b, length in enumerate(LENGTHS):
        blocks = -(-length // BLOCK)
        for g in range(KV_HEADS):
            heads = [(given.query[b, :length, h], TABLE[0][h]) for h in (2 * g, 2 * g + 1)]
            keep, columns = m_inference.group(heads, given.key[b, :length, g], BLOCK)
            np.testing.assert_array_equal(found[b, g, :blocks, :blocks], np.tril(keep | np.eye(blocks, dtype=bool)))
            np.testing.assert_array_equal(np.flatnonzero(single[b, g]), columns)


def test_a_table_knows_layers_and_heads_without_an_entry_have_the_default():
    given = dataclasses.replace(inputs(), layer=np.int32(1))
    each = vlc.MInference(TABLE, heads="each", **SMALL)
    found, _ = maps_of(run(each, given)[0])
    for h in range(2):
        keep, _ = m_inference((given.query[0, :, h], given.key[0, :, 0], None, BLOCK, 0), [TABLE[1][h]])
        np.testing.assert_array_equal(found[0, h], np.tril(keep | np.eye(25, dtype=bool)))
    assert np.array_equal(found[0, 2:], np.broadcast_to(np.tril(np.ones((25, 25), bool)), (2, 25, 25)))


def test_thresholds_of_layers_and_heads():
    table = ((0.5, 0.6, 0.8, 0.95), (0.9, 0.9, 0.9, 0.9))
    pattern = vlc.XAttention(table, 4, heads="each", **SMALL)
    found, _ = maps_of(run(pattern, inputs())[0])
    for h, share in enumerate(table[0]):
        alone = vlc.XAttention(share, 4, heads="each", **SMALL)
        np.testing.assert_array_equal(found[:, h], maps_of(run(alone, inputs())[0])[0][:, h])


def test_room_keeps_the_best_blocks_and_columns():
    given = inputs()
    whole = vlc.XAttention(0.9, 4, heads="each", **SMALL)
    full, _ = maps_of(run(whole, given)[0])
    lists, told = run(dataclasses.replace(whole, capacity=0.2), given)
    found, _ = maps_of(lists)
    assert lists.ids.shape[3] == 5
    scores = jax.jit(lambda q, k: whole.scores(dataclasses.replace(given, query=q, key=k)))
    scores = np.asarray(scores(given.query, given.key))
    for b, h, i in np.ndindex(*found.shape[:3]):
        wanted = np.flatnonzero(full[b, h, i])
        rank = np.where(wanted == i, np.inf, scores[b, h, i, wanted])
        best = np.sort(wanted[np.argsort(-rank, kind="stable")[:5]])
        np.testing.assert_array_equal(np.flatnonzero(found[b, h, i]), best)
    np.testing.assert_array_equal(told.overflow, full.sum(axis=(2, 3)) - found.sum(axis=(2, 3)))
    few = vlc.MInference(TABLE, most_columns=10, heads="each", **SMALL)
    lists, told = run(few, given)
    assert lists.loose.shape[2] == 10
    np.testing.assert_array_equal(told.overflow[0], [30, 0, 0, 25])


def test_files_of_the_authors(tmp_path):
    path = tmp_path / "heads.json"
    layer = {"0": ["vertical_and_slash", 30, 800, 0.97], "2": ["stream_llm", 100, 800, 1]}
    path.write_text(json.dumps([layer, {"1": ["block_sparse", 1, 1, 0.5]}]))
    default = ("vertical_and_slash", 1000, 6096)
    pattern = vlc.MInference(str(path))
    assert pattern.table[0] == (("vertical_and_slash", 30, 800), default, ("stream_llm", 100, 800))
    assert pattern.table[1] == (default, ("block_sparse", 1, 1))
    assert pattern == pattern_by_name(f"m_inference:{path}")
    assert hash(pattern) == hash(vlc.MInference(path))
    for text, message in (
        ("{}", "no patterns of heads"),
        ('[{"x": ["stream_llm", 1, 1, 1]}]', "no number of a head"),
        ('[{"0": ["dense", 1, 1, 1]}]', "is none of vertical_and_slash"),
        ('[{"0": ["stream_llm", -1, 1, 1]}]', "whole numbers"),
        ("[", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(vlc.InputError, match=message):
            vlc.MInference(path)
    with pytest.raises(vlc.InputError, match="cannot be read"):
        vlc.MInference(tmp_path / "none.json")


def test_strides_of_images_are_those_of_the_prompt():
    """Rows of 3 with a token behind each, two frames of 2 rows; one image without another; text."""
    row = [-1, 0, 0, 0, -1, 1, 1, 1, -1, 0, 0, 0, -1, 1, 1, 1, -1]
    column = [-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1]
    frame = [-1] * 9 + [1, 1, 1, -1, 1, 1, 1, -1]
    frame[1:4] = frame[5:8] = 0, 0, 0
    grid = np.full((3, 3, 17), -1, np.int32)
    grid[0] = frame, row, column
    grid[1, :, :9] = frame[:9], row[:9], column[:9]
    hidden, index = jnp.zeros((3, 17, 1)), jnp.zeros((3, 17), jnp.int32)
    stage = Stage(hidden, index, jnp.array([17, 9, 17]), index, grid=jnp.asarray(grid))
    np.testing.assert_array_equal(visual_strides(stage), [[4, 8], [4, 0], [0, 0]])
    assert visual_strides(dataclasses.replace(stage, grid=None)) is None


def test_diagonals():
    chosen = np.random.default_rng(0).random((3, 7)) < 0.5
    row, column = np.indices((7, 7))
    wanted = chosen[:, np.maximum(row - column, 0)] & (row >= column)
    np.testing.assert_array_equal(diagonals(jnp.asarray(chosen)), wanted)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("a_shape", vlc.AShape()),
        ("a_shape:64,window=512,heads=each", vlc.AShape(64, 512, heads="each")),
        ("x_attention:0.8,stride=8,dense_layers=0/1", vlc.XAttention(0.8, 8, dense_layers=(0, 1))),
        ("flex_prefill,gamma=0.95,min_tokens=0", vlc.FlexPrefill(0.95, min_tokens=0)),
        ("mm_inference,boundary=none", vlc.MMInference(boundary="none")),
    ],
)
def test_grammar(text, pattern):
    assert pattern_by_name(text) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x_atention", "did you mean"),
        ("a_shape,sink=3", "did you mean"),
        ("a_shape:3,sinks=4", "given twice"),
        ("a_shape,sinks", "name=value"),
        ("x_attention:much", "give a share"),
        ("x_attention,stride=7", "divisor of the block, 128"),
        ("flex_prefill:2", "give a share"),
        ("mm_inference,boundary=key", "'query' or 'none'"),
    ],
)
def test_grammar_errors(text, message):
    with pytest.raises(vlc.PolicyError, match=message):
        pattern_by_name(text)
