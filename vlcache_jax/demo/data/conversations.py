"""Samples as token ids, ready to be packed for training or asked one at a time."""

import functools

import numpy as np
from tokenizers import Tokenizer

from vlcache_jax.demo.data.labels import WORDS
from vlcache_jax.demo.data.samples import Sample
from vlcache_jax.demo.data.tokenizer import EOS, IMAGE, UNKNOWN, build_tokenizer
from vlcache_jax.demo.data.words import ITEMS, NAMES, SHAPES, plural
from vlcache_jax.inputs import TEXT
from vlcache_jax.training.batch import Conversation


@functools.cache
def _tokenizer() -> Tokenizer:
    return build_tokenizer()


@functools.cache
def _essential() -> frozenset[int]:
    """Ids of the words a question cannot do without."""
    names = [*NAMES, *ITEMS, *SHAPES, *map(plural, SHAPES), "where"]
    return frozenset(_tokenizer().token_to_id(name) for name in names)


def _ids(text: str) -> list[int]:
    return _tokenizer().encode(text, add_special_tokens=False).ids


def conversation(sample: Sample, rng: np.random.Generator | None = None) -> Conversation:
    """The prompt of a sample's images with all its questions.

    Args:
      sample: the sample. Its pixels stay uint8.
      rng: if given, some of the questions lose or blur a few words, so that the model bears other phrasings.
    """
    images, patches = len(sample.images), sample.labels.word.shape[1]
    # Encoded with the <s> the tokenizer puts in front of a prompt.
    prefix = _tokenizer().encode("USER:").ids + [_tokenizer().token_to_id(IMAGE)] * (images * patches)
    text = len(prefix) - images * patches
    vision_index = [TEXT] * text + list(range(images * patches))
    questions = []
    for question, answer in sample.questions:
        asked = _ids(question)
        if rng is not None and rng.random() < 0.3:
            asked = _blur(rng, asked)
        questions.append((asked + _ids("ASSISTANT:"), [*_ids(answer), _tokenizer().token_to_id(EOS)]))
    return Conversation(prefix, vision_index, questions, sample.images)


def patch_hints(sample: Sample) -> np.ndarray:
    """What the row of each patch can tell from what came before it, as token ids i32 [images * patches]; else -1.

    A field's value: the name of the field. A shape: its number in reading order.
    """
    names = np.array([-1, *(_tokenizer().token_to_id(word) for word in WORDS)], np.int32)
    hints = names[sample.labels.owner.reshape(-1)]
    shapes = np.flatnonzero(sample.labels.colour.reshape(-1))
    hints[shapes] = [_tokenizer().token_to_id(str(i)) for i in range(1, len(shapes) + 1)]
    return hints


def _blur(rng: np.random.Generator, ids: list[int]) -> list[int]:
    blurred = []
    for token in ids:
        luck = rng.random()
        if token in _essential() or luck > 0.2:
            blurred.append(token)
        elif luck > 0.1:
            blurred.append(_tokenizer().token_to_id(UNKNOWN))
    return blurred
