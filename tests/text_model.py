"""A decoder as a model whose images are tokens like others, without torch; and its answers by the definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.kernels.attention import Mask
from vlcache_jax.models.decoder.decoder import Decoder
from vlcache_jax.models.families.module import FamilyModule, in_order
from vlcache_jax.typing import Embedded, ModelSpec


class TextModel(FamilyModule):
    """A decoder as a model; `config` is a `DecoderConfig`, parameters are {"decoder": ...}.

    Visual tokens lie in images of `side` x `side`, as `Batch.vision_index` numbers them. With `axes` they have the
    positions that Qwen2-VL gives them; with `blocks` those of an image see each other, as in Gemma 3.
    """

    side: int = 0
    axes: bool = False
    blocks: bool = False

    def setup(self):
        self.decoder = Decoder(self.config, jnp.dtype(self.dtype), layout=self.layout)

    @property
    def spec(self):
        c = self.config
        return ModelSpec(
            num_layers=c.num_layers,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            max_positions=c.max_positions,
            dtype=jnp.dtype(self.dtype),
            windows=c.windows,
        )

    def embed(self, batch, position_ids=None):
        embedded = in_order(self.decoder.embed(jnp.asarray(batch.tokens)), batch)
        if not self.side:
            return embedded
        index, lengths = jnp.asarray(batch.vision_index), jnp.asarray(batch.lengths)
        visual, feature = (index != TEXT).astype(jnp.int32), index % self.side**2
        image = jnp.cumsum(visual * (feature == 0).astype(jnp.int32), axis=1, dtype=jnp.int32)
        positions, following = embedded.positions, embedded.next_position
        if self.axes:
            # An image moves what follows it on by its side; where it begins, `image` counts it already.
            start = jnp.cumsum(1 - visual, axis=1, dtype=jnp.int32) - (1 - visual) + self.side * (image - visual)
            axes = [start, start + visual * (feature // self.side), start + visual * (feature % self.side)]
            positions = jnp.stack(axes, axis=1).astype(jnp.int32)
            inside = jnp.arange(batch.length)[None] < lengths[:, None]
            following = jnp.max(jnp.where(inside[:, None], positions, -1), axis=(1, 2)) + 1
        blocks = jnp.where(visual > 0, image, -1) if self.blocks else None
        return Embedded(embedded.hidden, positions, following, blocks=blocks)


def text_batch(lengths, length, seed=0, images=((2, 10),)):
    """Right-padded prompts of random tokens; of `images`, (first token, tokens), what lies in a prompt is visual."""
    tokens = np.random.default_rng(seed).integers(3, 64, (len(lengths), length)).astype(np.int32)
    inside = np.arange(length) < np.asarray(lengths)[:, None]
    index = np.full(tokens.shape, TEXT, np.int32)
    for number, (first, count) in enumerate(images):
        index[:, first : first + count] = np.arange(count) + number * count
    pixels = np.zeros((len(lengths), 0, 4, 4, 3), np.float32)
    index = np.where(inside, index, TEXT).astype(np.int32)
    return Batch(np.where(inside, tokens, 0), np.asarray(lengths, np.int32), index, pixels)


def by_definition(model, params, batch, new, kept, shift=0, there=None):
    """Logits [tokens, rows, vocab] of answers: all keys, those hidden that a layer has not kept, or not in view.

    Args:
      new: the tokens of the answers, i32 [tokens, rows].
      kept: of every layer without a window the positions that it keeps of the prompt, i32 [rows, kv_heads, n].
      shift: added to the positions of the answers.
      there: of every layer and row the prompt's tokens that were not dropped before it; None: all.
    """
    spec, steps = model.spec, len(new)
    whole, rows, lengths = batch.length + steps, np.arange(batch.size)[:, None], np.asarray(batch.lengths)[:, None]
    answer = lengths + np.arange(steps)[None]  # where it lies; what follows it is seen by nothing before
    prompt = jax.jit(partial(model.apply, method="embed"))({"params": params}, batch)
    hidden = jnp.pad(prompt.hidden, ((0, 0), (0, steps), (0, 0)))
    hidden = hidden.at[rows, answer].set(model.apply({"params": params}, jnp.asarray(new).T, method="embed_tokens"))
    positions = np.pad(np.asarray(prompt.positions), (*[(0, 0)] * (prompt.positions.ndim - 1), (0, steps)))
    after = np.asarray(prompt.next_position)[:, None] + shift + np.arange(steps)[None]
    for axis in np.moveaxis(positions, 1, 0) if positions.ndim == 3 else [positions]:
        axis[rows, answer] = after
    blocks, column = prompt.blocks, np.arange(whole)
    if blocks is not None:
        blocks = jnp.where(column[None] < lengths, jnp.pad(blocks, ((0, 0), (0, steps))), -1)
    more = prompt.layer_inputs
    more = None if more is None else jnp.pad(more, ((0, 0), (0, 0), (0, steps), (0, 0)))
    layers = []
    for layer, window in enumerate(spec.layer_windows):
        seen = np.asarray(Mask(blocks=blocks, window=window).as_array(whole))
        seen = np.tile(seen[:, None], (1 if blocks is not None else batch.size, spec.num_kv_heads, 1, 1))
        if window is None:
            for row, head in np.ndindex(seen.shape[:2]):
                n = int(lengths[row, 0])
                seen[row, head, n:] &= np.isin(column, kept[layer][row][head]) | (column >= n)
        for row, held in enumerate([] if there is None else there[layer]):
            seen[row] &= np.isin(column, held) | (column >= int(lengths[row, 0]))
        layers.append(seen)

    def attend(query, key, value, carry, seen):
        group = query.shape[2] // key.shape[2]
        key, value, seen = (jnp.repeat(x, group, axis=a) for x, a in ((key, 2), (value, 2), (seen, 1)))
        logits = jnp.einsum("bthd,bshd->bhts", query, key, precision="highest") * query.shape[3] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, value, precision="highest"), carry, None

    @jax.jit
    def run(variables, hidden, layers):
        out = model.apply(variables, hidden, jnp.asarray(positions), attend, None, layers, more, method="decode")[0]
        return model.apply(variables, out[rows, answer], method="unembed")

    return np.asarray(run({"params": params}, hidden, np.stack(layers))).swapaxes(0, 1)
