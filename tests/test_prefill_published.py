"""Patterns of sparse prefill against what the authors' code chooses (prefill_published.py)."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from prefill_published import BLOCKS, CROSS, FLEX, SLASH, block_inputs, cross_inputs, flex_inputs, slash_inputs

import vlcache_jax as vlc
from vlcache_jax.patterns.pattern import PatternInputs, with_last_rows

FOUND = json.loads((Path(__file__).parent / "prefill_published.json").read_text(encoding="utf-8"))


def chosen(pattern, query, key):
    def choose(query, key):
        made = PatternInputs(
            query=query,
            key=key,
            lengths=np.asarray([query.shape[1]], np.int32),
            vision=np.zeros(query.shape[:2], bool),
            layer=np.int32(0),
            heads=np.arange(query.shape[2], dtype=np.int32),
            grid=None,
            block=pattern.block,
        )
        found = pattern.choose(with_last_rows(pattern, made))
        return found.blocks, found.rank, found.columns

    return [None if x is None else np.asarray(x)[0] for x in jax.jit(choose)(query[None], key[None])]


def test_flex_prefill():
    pattern = vlc.FlexPrefill(FLEX["gamma"], FLEX["tau"], FLEX["min_budget"], heads="each")
    keep, _, _ = chosen(pattern, *flex_inputs())
    found = [np.flatnonzero(np.tril(head)).tolist() for head in keep]
    assert found == FOUND["flex_prefill"]
    assert len({len(head) for head in found}) > 2, "heads of both kinds, and of several sizes"


def test_x_attention():
    keep, scores, _ = chosen(vlc.XAttention(CROSS["threshold"], CROSS["stride"], heads="each"), *cross_inputs())
    np.testing.assert_allclose(scores, FOUND["x_attention_sums"], atol=2e-5)
    found, wanted = np.tril(keep), np.asarray(FOUND["x_attention"], bool)
    # In their first chunk of rows the first block is not forced, and one block more is taken than the sums ask for.
    rows = CROSS["chunk"] // 128
    np.testing.assert_array_equal(found[:, rows:], wanted[:, rows:])
    assert wanted[:, :rows].sum() >= found[:, :rows].sum()
    assert wanted[:, rows:].sum() != 2 * sum(range(rows + 1, 2 * rows + 1))


def test_vertical_slash_of_m_inference():
    """Columns as they are; distances as the blocks of 64 and of 8 that they touch."""
    table = ((("vertical_and_slash", SLASH["v"], SLASH["s"]),),)
    for block in (64, 8):
        keep, _, columns = chosen(vlc.MInference(table, block=block), *slash_inputs())
        np.testing.assert_array_equal(np.flatnonzero(columns[0]), FOUND["vertical"])
        number = -(-SLASH["length"] // block)
        row, column = np.indices((number * block, number * block))
        touched = np.isin(row - column, FOUND["slash"]).reshape(number, block, number, block).any(axis=(1, 3))
        np.testing.assert_array_equal(keep[0], touched)


def test_block_sparse_of_m_inference():
    pattern = dataclasses.replace(vlc.MInference(((("block_sparse", 1, 1),),)), block=64)
    keep, _, _ = chosen(pattern, *block_inputs())
    number = -(-BLOCKS["length"] // 64)
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(FOUND["block_sparse"]), np.uint8))[: number**2]
    np.testing.assert_array_equal(keep[0], bits.reshape(number, number).astype(bool))
