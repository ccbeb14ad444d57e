"""The auxiliary parts of the demo's loss, against what they are defined to be."""

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.demo.recipe import eviction as demo_eviction
from vlcache_jax.demo.recipe.alignment import alignment
from vlcache_jax.demo.recipe.recipe import FULL, Shape
from vlcache_jax.demo.recipe.train import demo_batch
from vlcache_jax.kernels.attention import Mask, attention

BATCH = demo_batch(FULL, Shape(("documents", "scenes"), 4, 1, 2, 192), 0, 1)
LENGTH, COLUMNS = 192, 24


def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, LENGTH, 6, 32))
    return query, *(jax.random.normal(k, (2, LENGTH, 2, 32)) for k in keys[1:])


def test_look_ahead_targets_are_the_rest_of_the_answers():
    ahead, train = BATCH.ahead, BATCH.train
    for row in range(2):
        for question in np.flatnonzero(ahead.rows[row, :, 0]):
            last = int(ahead.rows[row, question, 0])
            assert ahead.rows[row, question].tolist() == [last, last - 1, last - 2, last - 3]
            rest = [int(t) for t in ahead.targets[row, question] if t >= 0]
            assert rest == train.batch.tokens[row, last + 2 : last + 2 + len(rest)].tolist()
            assert train.weights[row, last] > 0
            assert train.weights[row, last - 1] == 0


def test_eviction_of_nothing_is_full_attention(monkeypatch):
    query, key, value = arrays()
    segments = jnp.asarray(BATCH.train.segments)
    full, _ = attention(query, key, value, Mask(segments=segments))
    monkeypatch.setattr(demo_eviction, "_KEPT", (10_000,))
    new = demo_eviction.evicted_attention(jnp.zeros_like(full), query, key, value, segments, COLUMNS, BATCH.ahead)
    changed = np.asarray(jnp.any(new != 0, axis=(2, 3)))
    assert changed.sum() == (BATCH.ahead.targets >= 0).sum()  # the answers' rows, and no others
    np.testing.assert_allclose(np.asarray(new)[changed], np.asarray(full)[changed], atol=1e-5)
    monkeypatch.setattr(demo_eviction, "_KEPT", (4,))
    few = demo_eviction.evicted_attention(full, query, key, value, segments, COLUMNS, BATCH.ahead)
    assert not np.allclose(np.asarray(few)[changed], np.asarray(full)[changed], atol=1e-3)


def test_alignment_moves_only_the_questions():
    query, key, _ = arrays()
    segments = jnp.asarray(BATCH.train.segments)
    loss = jax.jit(lambda q: alignment(q, key, segments, COLUMNS, BATCH.ahead))
    assert float(loss(query)) > 0.1
    gradient = np.asarray(jax.grad(loss)(query))
    answers = np.asarray(BATCH.train.weights) > 0
    answers[np.arange(2)[:, None], BATCH.ahead.rows[:, :, 0]] = False  # the last row of a question writes, too
    assert np.abs(gradient[answers]).max() == 0
    assert np.abs(gradient).max() > 0
