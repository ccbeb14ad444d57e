"""What lmms-eval asks, in this library's words. Nothing here imports lmms-eval."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlcache_jax.engine.requests import Request
from vlcache_jax.errors import InputError
from vlcache_jax.inference.sampling import Sampling
from vlcache_jax.models.processor import Processor

MAX_NEW_TOKENS = 1024
"""Of tasks that say nothing, as lmms-eval's own models have it."""

_WITHOUT_EFFECT = {"image_aspect_ratio", "use_cache", "skip_special_tokens", "visual_cot", "max_agentic_steps"}
_ONLY = {"num_beams": 1, "repetition_penalty": 1}
_USED = {"max_new_tokens", "temperature", "do_sample", "top_p", "top_k", "until", "stop_sequences", "seed"}

Messages = list[dict[str, Any]]


def of_simple(context: str, visuals: Any) -> Messages:
    """A conversation of one message: its images, in order, and then the text."""
    visuals = [] if visuals is None else list(visuals) if isinstance(visuals, list | tuple) else [visuals]
    parts = [{"type": "image", "image": image} for image in visuals]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}]


def of_chat(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """lmms-eval's messages, whose images and videos are under "url"."""
    return [{"role": message["role"], "content": [_part(part) for part in message["content"]]} for message in messages]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "video"):
        return {"type": kind, kind: part["url"]}
    raise InputError(f"a part of type {kind!r} is not supported: text, images and videos are")


def request(processor: Processor, messages: Messages, asked: Mapping[str, Any], number: int = 0) -> Request:
    """A request to the engine.

    Args:
      processor: of the checkpoint.
      messages: of the conversation.
      asked: lmms-eval's `gen_kwargs`.
      number: of the sample, which draws with its own seed.

    Raises:
      InputError: something that changes answers and is not offered, such as beams.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    for name, value in asked.items():
        if name in _ONLY and value != _ONLY[name]:
            raise InputError(f"{name}={value!r} is not supported: leave it out, or give {_ONLY[name]}")
        if name not in _USED and name not in _WITHOUT_EFFECT and name not in _ONLY:
            raise InputError(f"gen_kwargs has {name}={value!r}, which is not known: leave it out")
    sampling, temperature = None, asked.get("temperature", 1.0 if asked.get("do_sample") else 0.0)
    if temperature and asked.get("do_sample", True):
        sampling = Sampling(temperature=temperature, top_k=asked.get("top_k"), top_p=asked.get("top_p"))
    stops = [*_texts(asked.get("until", [])), *_texts(asked.get("stop_sequences", []))]
    options: dict[str, Any] = {
        "max_new_tokens": int(asked.get("max_new_tokens", MAX_NEW_TOKENS)),
        "sampling": sampling,
        "seed": int(asked.get("seed", 0)) + number,
        # A task that says nothing has the blank line between examples; models for chats go on behind one.
        "stop": [stop for stop in stops if stop and stop != "\n\n"],
    }
    if processor.has_chat_template:
        return Request(prompt=messages, **options)
    parts = [part for message in messages for part in message["content"]]
    text = "\n".join(part["text"] if part["type"] == "text" else processor.image_token for part in parts)
    return Request(prompt=text, images=[part["image"] for part in parts if part["type"] == "image"], **options)


def _texts(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value
