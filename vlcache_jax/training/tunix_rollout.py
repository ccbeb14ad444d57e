"""For tunix's learners (GRPO and others): a model of this library as their actor, and rollouts from a compressed cache.

Needs `google-tunix`, which the package's extra `tunix` installs. Prompts are texts, as tunix has them.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import common
from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig, RolloutOutput

from vlcache_jax.errors import InputError
from vlcache_jax.inference.generate import answer
from vlcache_jax.inference.prefill import compress
from vlcache_jax.inference.recipe import Recipe
from vlcache_jax.inference.sampling import Sampling
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.policies.policy import Policy


class Actor(nnx.Module):
    """A model as tunix's learners call it: `actor(tokens, positions, cache, attention_mask) -> (logits, None)`.

    Its `nnx.Param`s are the parameters of `vlm`, one for each array; the decoder runs as it does under
    `training.answer_loss`, with the fast attention of the platform. LoRA is tunix's own business (qwix finds no layers
    here): give a learner the whole actor.

    Args:
      vlm: loaded with `layout="stacked"`, and `param_dtype="float32"` to be trained.

    Raises:
      InputError: weights that lie for inference, or that are codes.
    """

    def __init__(self, vlm: VLM) -> None:
        if getattr(vlm.model, "layout", "stacked") != "stacked":
            raise InputError('the weights lie for inference: load the model with layout="stacked"')
        if any(not jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(vlm.params)):
            raise InputError('the model has codes of weights, which cannot be trained: load it with weights="float"')
        self.model = vlm.model
        self.weights = nnx.data(jax.tree.map(lambda x: nnx.Param(jnp.asarray(x)), vlm.params))

    @property
    def params(self) -> Any:
        """As `vlc.generate` takes them."""
        return jax.tree.map(lambda x: x[...], self.weights, is_leaf=lambda x: isinstance(x, nnx.Param))

    def __call__(
        self, input_tokens: jax.Array, positions: jax.Array, cache: Any = None, attention_mask: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """Logits f32 [batch, length, vocab] of rows that are padded on both sides, and no cache.

            tokens    <pad> <pad> What is 2 ? | 4 </s> <pad>     prompt | answer, as tunix joins them
            computed  What is 2 ? 4 </s> <pad> <pad> <pad>       causal rows from the left, and turned back

        Args:
          input_tokens: i32 [batch, length].
          positions: not used; those of a text are 0, 1, 2 ...
          cache: None.
          attention_mask: bool [batch, length, length], causal within each row's tokens; a token that nobody sees is
            padding.

        Raises:
          InputError: a cache, or packed rows (no mask).
        """
        if cache is not None or attention_mask is None:
            raise InputError("Actor takes whole rows with their attention mask: no cache, and no packed rows")
        real = jnp.any(attention_mask, axis=1)
        place, length = jax.lax.iota(jnp.int32, real.shape[1])[None], real.shape[1]
        first, lengths = jnp.argmax(real, axis=1)[:, None], jnp.sum(real, axis=1, dtype=jnp.int32)
        tokens = jnp.take_along_axis(input_tokens, (place + first) % length, axis=1)
        tokens = jnp.where(place < lengths[:, None], tokens, 0)
        batch = text_batch(self.model, tokens, jnp.maximum(lengths, 1))
        logits = self.model.apply({"params": self.params}, batch, method="forward")
        return jnp.take_along_axis(logits, ((place - first) % length)[..., None], axis=1), None


class Rollout(BaseRollout):
    """tunix's rollout interface: answers from a compressed cache, each prompt read once however often it is asked.

    Equal prompts that follow one another, as tunix repeats them for a group, share one compressed prefill. `logprobs`
    of the output are those that the tokens were drawn with, under what was kept; `get_per_token_logps` gives those
    under the full cache, so that a learner can weigh one against the other.

    Args:
      rollout_actor: the `Actor`.
      tokenizer: tunix's adapter of one; of the checkpoint's own, `RLCluster(tokenizer=Words(vlm), ...)`.
      mesh, rollout_config: as tunix gives them; not used here.
      policy: what to keep, or a recipe; `FullCache()` by default.

    Raises:
      InputError: the actor is none of this library.

    Example:
      cluster = rl_cluster.ClusterConfig(..., rollout_engine=functools.partial(Rollout, policy=vlc.RankedBits()))
    """

    def __init__(
        self,
        rollout_actor: Any,
        tokenizer: Any,
        mesh: Any = None,
        rollout_config: RolloutConfig | None = None,
        *,
        policy: Policy | Recipe | None = None,
    ) -> None:
        if not isinstance(rollout_actor, Actor):
            raise InputError(f"the rollout actor is a {type(rollout_actor).__name__}: give an Actor(vlm)")
        self._actor, self._tokenizer, self._policy, self._calls = rollout_actor, tokenizer, policy, 0

    def generate(self, prompts: list[str], rollout_config: RolloutConfig, **kwargs: Any) -> RolloutOutput:
        """Draws an answer to each prompt.

        Each call draws anew, from the seed and the number of the call, so that a run repeats itself. Warns of prompts
        that are longer than `max_prompt_length`: their end is taken.

        Raises:
          InputError: see `vlc.generate`.
        """
        config = rollout_config
        rows = [self._ids(prompt, config.max_prompt_length) for prompt in prompts]
        padded = np.full((len(rows), config.max_prompt_length), self.pad_id(), np.int32)  # on the left, for tunix
        for padded_row, row in zip(padded, rows, strict=True):
            padded_row[len(padded_row) - len(row) :] = row
        group, sampling = _repeats(prompts), _sampling(config)
        samples = 1 if sampling is None else group
        read, places = rows[::group], np.arange(config.max_prompt_length)
        lengths = np.array([len(row) for row in read], np.int32)
        tokens = np.zeros((len(read), config.max_prompt_length), np.int32)
        tokens[places < lengths[:, None]] = np.concatenate(read)
        batch = text_batch(self._actor.model, jnp.asarray(tokens), jnp.asarray(lengths))
        out = answer(
            compress(self._actor.model, self._actor.params, batch, self._policy),
            max_new_tokens=config.max_tokens_to_generate,
            samples=samples,
            sampling=sampling,
            seeds=self._seeds(config.seed, (len(read), samples)),
            eos_token_ids=config.eos_tokens or [self.eos_id()],
            log_probabilities=True,
        )
        found = (np.asarray(x) for x in (out.tokens, out.sampling_log_probabilities, out.lengths))
        said, logs, ends = (np.repeat(x.reshape(-1, *x.shape[2:]), group // samples, axis=0) for x in found)
        answers = [row[:end] for row, end in zip(said, ends, strict=True)]
        return RolloutOutput(
            text=[self._tokenizer.decode(row.tolist()) for row in answers],
            logits=None,
            tokens=answers,
            left_padded_prompt_tokens=padded,
            logprobs=[row[:end] for row, end in zip(logs, ends, strict=True)] if config.return_logprobs else None,
        )

    def get_per_token_logps(self, prompt_tokens: jax.Array, completion_tokens: jax.Array) -> jax.Array:
        """Under the full cache, f32 [batch, completion length]; see tunix."""
        graph, state = nnx.split(self._actor)
        return common.compute_per_token_logps(
            graph, state, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
            pad_id=self.pad_id(), eos_id=self.eos_id(), stop_gradient=True, return_logits=False,
        )  # fmt: skip

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Takes a learner's parameters, to where the actor's own lie and in their dtype."""
        own = nnx.state(self._actor, *(filter_types or (nnx.Param,)))
        nnx.update(
            self._actor, jax.tree.map(lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding), params, own)
        )

    def pad_id(self) -> int:
        """The tokenizer's."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """The tokenizer's."""
        return self._tokenizer.eos_id()

    def model(self) -> Actor:
        """The actor."""
        return self._actor

    def _ids(self, prompt: str, most: int) -> list[int]:
        begin = self._tokenizer.bos_id()
        ids = self._tokenizer.dedup_bos_ids([*([] if begin is None else [begin]), *self._tokenizer.encode(prompt)])
        if not ids:
            raise InputError("a prompt is empty")
        if len(ids) > most:
            warnings.warn(f"a prompt of {len(ids)} tokens is cut to its last {most} (max_prompt_length)", stacklevel=3)
        return ids[-most:]

    def _seeds(self, given: Any, shape: tuple[int, int]) -> jax.Array:
        """A key for each answer: one for all prompts would draw alike for all."""
        key = jax.random.key(0) if given is None else jnp.asarray(given)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        self._calls += 1
        return jax.random.split(jax.random.fold_in(key, self._calls), shape)


class Words:
    """The checkpoint's tokenizer with the methods that tunix asks for; `encode` puts the first token by itself."""

    def __init__(self, vlm: VLM) -> None:
        self._tokenizer, self._pad = vlm.processor.tokenizer, vlm.processor.padding_id
        self._ends = vlm.model.spec.eos_token_ids

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Ids of a text."""
        return self._tokenizer.encode(str(text))

    def decode(self, ids: Sequence[int], **kwargs: Any) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(ids)

    def bos_id(self) -> int | None:
        """None: see `encode`."""
        return None

    def eos_id(self) -> int:
        """What ends an answer."""
        return self._ends[0]

    def pad_id(self) -> int:
        """What fills rows."""
        return self._pad


def text_batch(model: Any, tokens: jax.Array, lengths: jax.Array) -> Batch:
    """Prompts without images, i32 [batch, length] and [batch], as a batch of `model`."""
    shapes = model.abstract_batch(*tokens.shape, 0)
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return Batch(tokens, lengths, jnp.full(tokens.shape, TEXT, jnp.int32), batch.pixels, batch.cells)


def _repeats(prompts: Sequence[str]) -> int:
    """How often each prompt stands there in a row, if all do equally often; else 1."""
    starts = [i for i, prompt in enumerate(prompts) if not i or prompt != prompts[i - 1]]
    group = len(prompts) // len(starts)
    return group if starts == list(range(0, len(prompts), group)) else 1


def _sampling(config: RolloutConfig) -> Sampling | None:
    if not config.temperature:
        return None
    top_k = None if config.top_k in (None, -1) else config.top_k
    return Sampling(temperature=config.temperature, top_p=config.top_p, top_k=top_k)
