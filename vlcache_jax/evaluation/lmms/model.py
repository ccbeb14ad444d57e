"""The two classes of lmms-eval, for its messages and for its plain prompts."""

import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from vlcache_jax.engine.engine import Engine
from vlcache_jax.errors import InputError
from vlcache_jax.evaluation.lmms.losses import losses
from vlcache_jax.evaluation.lmms.prompts import Messages, of_chat, of_simple, request
from vlcache_jax.inference.recipe import recipe_by_name
from vlcache_jax.models.io.loading import load
from vlcache_jax.terminal import defaults
from vlcache_jax.terminal.progress import Progress

_LOG = logging.getLogger("vlcache_jax")


class _Loss(tuple, GenerationResult):
    """(loss, greedy) of an answer. lmms-eval 0.7.3 makes a text of any other pair, before it compares them."""

    def __init__(self, pair: tuple[float, bool]) -> None:
        pass

    @property
    def text(self) -> tuple[float, bool]:
        """The pair itself."""
        return tuple(self)


class SimpleModel(lmms):  # type: ignore[misc]
    """A checkpoint with a compressed cache, for tasks of texts and images.

    No batch size changes an answer: it says how many rows are decoded at once.

    Args:
      pretrained: a folder, or an id on the Hub.
      policy: a policy or recipe as typed on the command line; options have ";" between them, as lmms-eval splits at
        commas.
      rows: answers that are decoded at once; the batch size if that is above 1, and else as many as fit.
      dtype: of parameters and cache: bfloat16, or float32 on a CPU, by default.
      mesh: devices, such as 4x2: the first number splits the rows, the second the model. By default one device.
      max_image_tokens: of each image, for models that take any size.
      revision: of a model on the Hub.
      batch_size, max_batch_size, device: as lmms-eval gives them.

    Raises:
      InputError: an unknown argument, or one that is none.
      PolicyError: an unknown policy.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        policy: str = defaults.POLICY,
        rows: int | None = None,
        dtype: str | None = None,
        mesh: str | None = None,
        max_image_tokens: int | None = None,
        revision: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise InputError(f"model_args has {', '.join(sorted(others))}, which is not known: leave it out")
        self._recipe = recipe_by_name(str(policy).replace(";", ","))
        size = int(str(batch_size)) if str(batch_size).isdecimal() else 1
        self._rows: Any = rows or (size if size > 1 else "auto")
        limits = None if max_image_tokens is None else {"max_image_tokens": max_image_tokens}
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        self._vlm = load(str(pretrained), dtype, _mesh(mesh), revision=revision, image_limits=limits)

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers, in the order of the requests."""
        asked = []
        for instance in requests:
            messages, options = self._asked(instance.args)
            asked.append(request(self._vlm.processor, messages, options, int(instance.args[3])))
        most = max((one.max_new_tokens or 0 for one in asked), default=1)
        engine = Engine(self._vlm, self._recipe, rows=self._rows, max_new_tokens=most)
        found, start = [], time.monotonic()
        with Progress() as progress:
            progress.step("measuring the prompts, and compiling")
            engine.warmup(asked)
            progress.step("answering", total=len(asked))
            for result in engine.run(asked, ordered=True):
                if not result.ok:
                    _LOG.error("request %d has no answer: %s", result.index, result.reason)
                text, instance = result.text or "", requests[result.index]
                found.append(GenerationResult(text, TokenCounts(result.prompt_tokens, len(result.tokens))))
                options = next(item for item in instance.args if isinstance(item, dict))
                self.cache_hook.add_partial("generate_until", (instance.args[0], options), text)
                progress.advance()
        stats, seconds = engine.stats(), time.monotonic() - start
        log_metrics(
            total_gen_tokens=stats.tokens,
            total_elapsed_time=seconds,
            avg_speed=stats.tokens / seconds,
            additional_metrics={"rank": self.rank},
        )
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> Sequence[tuple[float, bool]]:
        """(mean negative log-likelihood of a token, of which lmms-eval takes the least; greedy) of each request."""
        prompts, answers = [], []
        for _, group in itertools.groupby(requests, key=lambda instance: _of_prompt(instance.args)):
            same = list(group)
            context, _, *where = same[0].args
            visuals = where[0](self._document(*where[1:])) if where else None
            prompts.append(request(self._vlm.processor, of_simple(context, visuals), {}))
            answers.append([self._target(instance.args) for instance in same])
        with Progress() as progress:
            progress.step(f"scoring the answers to {len(prompts)} prompts")
            found = [_Loss(pair) for pairs in losses(self._vlm, self._recipe, prompts, answers) for pair in pairs]
        for instance, pair in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", instance.args, pair)
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Is not offered."""
        raise NotImplementedError("vlcache_jax answers tasks of one round: leave tasks of several out")

    def clean(self) -> None:
        """Frees the checkpoint."""
        self._vlm = None  # type: ignore[assignment]

    def _asked(self, args: Any) -> tuple[Messages, dict[str, Any]]:
        context, options, doc_to_visual, *where = args
        return of_simple(context, doc_to_visual(self._document(*where))), options

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _target(self, args: Any) -> str:
        target = args[1]
        return target if isinstance(target, str) else target(self._document(*args[3:]))


class ChatModel(SimpleModel):
    """The same, for lmms-eval's messages."""

    is_simple = False

    def _asked(self, args: Any) -> tuple[Messages, dict[str, Any]]:
        _, doc_to_messages, options, *where = args
        return of_chat(doc_to_messages(self._document(*where))), options


def _of_prompt(args: Any) -> Any:
    return (args[0], *args[3:])


def _mesh(text: str | None) -> jax.sharding.Mesh | None:
    if text is None:
        return None
    data, _, model = str(text).partition("x")
    if not (data.isdecimal() and model.isdecimal() and int(data) * int(model) == jax.device_count()):
        raise InputError(f"mesh={text!r} is not of the form 4x2, for {jax.device_count()} devices")
    return jax.make_mesh((int(data), int(model)), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
