"""What a pruning method looks at, made of random numbers, and the same row by row in NumPy, without a model."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from vlcache_jax.inputs import NEWLINE, TEXT
from vlcache_jax.pruning.method import Between
from vlcache_jax.pruning.stage import Choice, Stage
from vlcache_jax.typing import TowerView

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, SIDE, ROOM, NEURONS = 6, 24, 4, 2, 8, 6, 96, 20
BATCH = 5
FREQUENCY = 50.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))


class Stub:
    """Ragged rows: one image; two with tokens left out and row breaks; text only; an image at the end; hardly any."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        index = np.full((BATCH, ROOM), TEXT, np.int32)
        index[0, 3 : 3 + SIDE**2] = np.arange(SIDE**2)
        two = np.sort(rng.permutation(2 * SIDE**2)[:50])
        index[1, 2 : 2 + 50] = np.where(np.arange(50) % 17 == 16, NEWLINE, two)
        index[3, 5 : 5 + SIDE**2] = np.arange(SIDE**2)
        index[4, 1:4] = [0, 9, 10]
        self.lengths = np.array([50, 90, 30, 5 + SIDE**2, 6], np.int32)
        inside = np.arange(ROOM) < self.lengths[:, None]
        self.vision_index = np.where(inside, index, TEXT).astype(np.int32)
        feature = self.vision_index % SIDE**2
        places = np.stack([self.vision_index // SIDE**2, feature // SIDE, feature % SIDE], axis=1)
        self.grid = np.where(self.vision_index[:, None] >= 0, places, -1).astype(np.int32)

        def tokens(*shape):
            drawn = rng.normal(size=(BATCH, ROOM, *shape))
            return np.where(inside.reshape(BATCH, ROOM, *[1] * len(shape)), drawn, 1e3).astype(np.float32)

        self.hidden, self.entered = tokens(WIDTH), tokens(WIDTH)
        self.positions = np.minimum(np.arange(ROOM)[None], self.lengths[:, None] - 1).astype(np.int32)
        self.attention, self.keys, self.features = np.abs(tokens()), tokens(HEAD_DIM), tokens(12)
        self.entropy = np.abs(tokens())
        shape = (LAYERS, WIDTH)
        self.query, self.key, self.value = (
            rng.normal(size=(*shape, n * HEAD_DIM)).astype(np.float32) / 3 for n in (HEADS, KV_HEADS, KV_HEADS)
        )
        self.projector = rng.normal(size=(12, WIDTH)).astype(np.float32)
        self.gate = rng.normal(size=(*shape, NEURONS)).astype(np.float32)

    def project(self, layer, hidden, positions):
        """As in `Between`."""

        def heads(weights, rotated):
            y = (jnp.matmul(hidden, jnp.asarray(weights[layer], hidden.dtype), precision="highest")).reshape(
                *hidden.shape[:2], -1, HEAD_DIM
            )
            if not rotated:
                return y
            y, angle = (
                y.astype(jnp.float32),
                positions[..., None, None].astype(jnp.float32) * FREQUENCY.astype(np.float32)[None, None, None],
            )
            first, second = jnp.split(y, 2, axis=-1)
            cos, sin = jnp.cos(angle), jnp.sin(angle)
            y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
            return y.astype(hidden.dtype)

        return heads(self.query, True), heads(self.key, True), heads(self.value, False)

    def stage(self, hidden, layers=(1, 4)):
        """All tokens, behind some layers."""
        arrays = map(jnp.asarray, (hidden, self.positions, self.lengths, self.vision_index))
        return Stage(*arrays, grid=jnp.asarray(self.grid), layers=layers)

    def between(self, thinned):
        """All tokens there are at a cut; `thinned`: every fifth visual token is gone already."""
        prompt, stage, entered = map(self.stage, (self.entered, self.hidden, self.entered))
        if thinned:
            scores = -(jnp.arange(ROOM)[None] % 5 == 0).astype(jnp.float32) + jnp.zeros((BATCH, 1))
            left = jnp.sum(stage.droppable, axis=1) - jnp.sum(stage.droppable & (scores < 0), axis=1)
            choice = Choice(scores)
            stage, entered = (
                dataclasses.replace(x.dropping(choice, left.astype(jnp.int32), None, ROOM - 7, 3), layers=x.layers)
                for x in (stage, entered)
            )
        tower = TowerView(*map(jnp.asarray, (self.attention, self.keys, self.features, self.entropy)))
        return Between(stage, entered, prompt, self.project, tower, lambda x: x @ jnp.asarray(self.projector))

    def row(self, between, number):
        """One row of it in NumPy, float64, without padding."""
        stage, n = between.stage, int(between.stage.lengths[number])
        places = np.asarray(stage.places)[number, :n]
        prompt = self.vision_index[number, : self.lengths[number] - 1]
        return Row(self, places, np.asarray(stage.hidden)[number, :n], number, int((prompt != TEXT).sum()))

    def prompt_row(self, number):
        """A row as its prompt was."""
        n = self.lengths[number]
        return Row(self, np.arange(n), self.entered[number, :n], number, 0)


class Row:
    """A row of a `Stub` at a cut: `hidden` and `entered` [n, width]; `visual` tokens may go, the prompt had `count`."""

    def __init__(self, stub, places, hidden, number, count):
        self.stub, self.places, self.n, self.count, self.number = stub, places, len(places), count, number
        self.hidden = hidden.astype(np.float64)
        self.entered = stub.entered[number, places].astype(np.float64)
        self.index, self.grid = stub.vision_index[number, places], stub.grid[number][:, places]
        self.visual = [i for i in range(self.n - 1) if self.index[i] != TEXT]
        self.text = [i for i in range(self.n) if self.index[i] == TEXT]
        self.attention = np.where(self.index >= 0, stub.attention[number, places], 0)
        self.entropy = stub.entropy[number, places]
        self.keys, self.features = (x[number, places].astype(np.float64) for x in (stub.keys, stub.features))

    def heads(self, layer, hidden, rotated=True):
        """Queries and keys [n, query heads, d] of a layer, each key beside its queries."""
        angle = (self.places if rotated else 0 * self.places)[:, None, None] * FREQUENCY

        def turned(weights):
            y = (hidden @ weights[layer].astype(np.float64)).reshape(len(hidden), -1, HEAD_DIM)
            first, second = np.split(y, 2, axis=-1)
            cos, sin = np.cos(angle), np.sin(angle)
            return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

        return turned(self.stub.query), np.repeat(turned(self.stub.key), HEADS // KV_HEADS, axis=1)

    def attention_of(self, rows, layer, hidden, over=None, rotated=True):
        """Attention [heads, rows, n] of some rows with all tokens, or with those in `over`; causal ones it is not."""
        query, key = self.heads(layer, hidden, rotated)
        logits = np.einsum("qhd,khd->hqk", query[rows], key) / np.sqrt(HEAD_DIM)
        seen = np.isin(np.arange(self.n), range(self.n) if over is None else over)
        weights = np.where(seen, np.exp(logits - logits.max()), 0)
        return weights / weights.sum(axis=-1, keepdims=True)
