"""From the body of a chat request to what the engine is asked. Nothing of it is trusted.

Whatever would change an answer and is not offered is refused, with its name; nothing is left out in silence.
"""

import dataclasses
import io
import secrets
from typing import Any

from vlcache_jax.engine.requests import Request
from vlcache_jax.errors import InputError, is_number
from vlcache_jax.files.json_text import parse_json, shorten
from vlcache_jax.inference.sampling import Sampling
from vlcache_jax.models.images.data_url import read_data_url
from vlcache_jax.models.images.opening import open_image
from vlcache_jax.serving.limits import Limits
from vlcache_jax.serving.refusal import Refusal

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_USED = {
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "n", "stop", "seed", "logprobs", "top_logprobs",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
_ONLY: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields of the API of which nothing but these values is offered."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A chat request.

    Attributes:
      request: for the engine.
      choices: answers that the client gets of each sample: several where all would be the same.
      stream: hand them out as they come.
      usage: end the stream with the numbers of tokens.
    """

    request: Request
    choices: int
    stream: bool
    usage: bool


def read_chat(body: bytes, model: str, max_new_tokens: int, limits: Limits, top_logprobs: int = 0) -> Asked:
    """Reads a request.

    Args:
      body: JSON.
      model: that is served.
      max_new_tokens: the most.
      limits: of the server.
      top_logprobs: the most.

    Raises:
      Refusal: anything that is wrong with it, but for what only the prompt's template and length can tell.
    """
    try:
        fields = parse_json(body, limits.body_bytes)
    except ValueError as error:
        raise Refusal(400, f"the body is no JSON that can be read: {error}") from error
    if not isinstance(fields, dict):
        raise Refusal(400, f"the body is {shorten(fields)}: give a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    _check_names(fields)
    if fields.get("model") != model:
        raise Refusal(
            404, f"the model {shorten(fields.get('model'))} is not served here: {model!r} is",
            param="model", code="model_not_found",
        )  # fmt: skip
    options = _object(fields, "stream_options", {"include_usage", "include_obfuscation"})
    if options and not _flag(fields, "stream"):
        raise Refusal(400, "stream_options is for stream=true", param="stream_options")
    most = {
        name: _whole(fields, name, 1, max_new_tokens)
        for name in ("max_completion_tokens", "max_tokens")
        if name in fields
    }
    temperature = _number(fields, "temperature", 0, 2, 1)
    top_k, top_p = _whole(fields, "top_k", 1, 2**31 - 1, None), _number(fields, "top_p", 0, 1, 1)
    if not top_p:
        raise Refusal(400, "top_p=0 leaves no token: give a number above 0, or temperature=0", param="top_p")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p) if temperature else None
    count = _whole(fields, "n", 1, limits.samples, 1)
    top = _whole(fields, "top_logprobs", 0, top_logprobs, 0)
    if top and not _flag(fields, "logprobs"):
        raise Refusal(400, "top_logprobs is for logprobs=true", param="top_logprobs")
    request = Request(
        prompt=_messages(fields.get("messages"), limits),
        max_new_tokens=min(most.values(), default=max_new_tokens),
        samples=count if sampling else 1,
        sampling=sampling,
        seed=_whole(fields, "seed", -(2**63), 2**63 - 1, secrets.randbits(63)),
        stop=_stops(fields.get("stop", []), limits),
        log_probabilities=_flag(fields, "logprobs"),
        top_log_probabilities=top,
    )
    return Asked(request, 1 if sampling else count, _flag(fields, "stream"), _flag(options, "include_usage"))


def _check_names(fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if name in _ONLY and value not in _ONLY[name]:
            offered = " or ".join(map(shorten, _ONLY[name]))
            raise Refusal(400, f"{name}={shorten(value)} is not supported: leave it out, or give {offered}", param=name)
        if name not in _USED and name not in _WITHOUT_EFFECT and name not in _ONLY:
            raise Refusal(400, f"the field {shorten(name)} is not known: leave it out", param=name[:100])


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise Refusal(400, f"{name}={shorten(value)}: give true or false", param=name)
    return value


def _number(fields: dict[str, Any], name: str, low: float, high: float, default: Any = None) -> Any:
    value = fields.get(name, default)
    if value is default:
        return value
    if not is_number(value, low, high):
        raise Refusal(400, f"{name}={shorten(value)}: give a number from {low} to {high}", param=name)
    return value


def _whole(fields: dict[str, Any], name: str, low: int, high: int, default: Any = None) -> Any:
    value = _number(fields, name, low, high, default)
    if value is not default and not isinstance(value, int):
        raise Refusal(400, f"{name}={shorten(value)}: give a whole number from {low} to {high}", param=name)
    return value


def _object(fields: dict[str, Any], name: str, known: set[str]) -> dict[str, Any]:
    value = fields.get(name, {})
    if not isinstance(value, dict) or not set(value) <= known:
        raise Refusal(400, f"{name}={shorten(value)}: give an object of {', '.join(sorted(known))}", param=name)
    return {key: x for key, x in value.items() if x is not None}


def _stops(value: Any, limits: Limits) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and all(isinstance(stop, str) and 0 < len(stop) <= 1000 for stop in stops)
    if not good or len(stops) > limits.stops:
        raise Refusal(400, f"stop={shorten(value)}: give a text, or a list of at most {limits.stops}", param="stop")
    return stops


def _messages(messages: Any, limits: Limits) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, f"messages={shorten(messages)}: give a list of messages", param="messages")
    images = _Images(limits)
    return [_message(message, f"messages[{number}]", images) for number, message in enumerate(messages)]


def _message(message: Any, where: str, images: "_Images") -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Refusal(400, f"{where} is {shorten(message)}: give a message, with role and content", param=where)
    for name, value in message.items():
        if name not in ("role", "content", "name", "refusal") and value not in (None, []):
            raise Refusal(400, f"{where}.{name[:40]} is not supported: leave it out", param=where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise Refusal(400, f"{where}.role is {shorten(role)}: give one of {', '.join(_ROLES)}", param=f"{where}.role")
    if isinstance(content, list) and content:
        parts = [_part(part, f"{where}.content[{number}]", images) for number, part in enumerate(content)]
        return {"role": _ROLES[role], "content": parts}
    if not isinstance(content, str):
        raise Refusal(
            400, f"{where}.content is {shorten(content)}: give a text or a list of parts", param=f"{where}.content"
        )
    return {"role": _ROLES[role], "content": content}


def _part(part: Any, where: str, images: "_Images") -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    url = part.get("image_url") if kind == "image_url" else None
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise Refusal(
            400,
            f"{where} is {shorten(part)}: give {{'type': 'text', 'text': ...}} or {{'type': 'image_url', 'image_url': "
            "{'url': 'data:image/png;base64,...'}}",
            param=where,
        )
    return {"type": "image", "image": images.add(url, where)}


class _Images:
    """The images of a request, of which only the headers are read here."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._count, self._pixels = limits, 0, 0

    def add(self, url: str, where: str) -> Any:
        """An image that is not decoded yet."""
        self._count += 1
        if self._count > self._limits.images:
            raise Refusal(400, f"there are more than {self._limits.images} images: ask about fewer", param=where)
        try:
            image = open_image(io.BytesIO(read_data_url(url, where)), where)
        except InputError as error:
            raise Refusal(400, str(error), param=where) from error
        self._pixels += image.width * image.height
        if self._pixels > self._limits.pixels:
            raise Refusal(
                400,
                f"the images have more than {self._limits.pixels / 1e6:.0f} million pixels in all: scale them down",
                param=where,
            )
        return image
