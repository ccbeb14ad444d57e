"""Chat templates: conversations to prompts, as transformers' `apply_chat_template` renders them."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.models.processing.files import read_json, read_text
from vlcache_jax.models.processing.images import is_image_like

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template. Templates are code from a checkpoint, so they run in Jinja's immutable sandbox.

    Raises CheckpointError if the template does not parse.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template does not parse ({error}): correct chat_template.jinja") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt of one conversation, whose messages hold nothing but plain JSON values.

        Raises:
          InputError: the template refuses the conversation (by `raise_exception`).
          CheckpointError: the template does what the sandbox forbids, or fails.
        """
        prompt = self._render(messages, add_generation_prompt)
        texts = [message["content"].strip() for message in messages if isinstance(message.get("content"), str)]
        if all(text in prompt for text in texts):
            return prompt
        # Templates such as LLaVA-1.5's expect a list of parts and silently drop a plain text.
        wrapped = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message.get("content"), str)
            else message
            for message in messages
        ]
        from_parts = self._render(wrapped, add_generation_prompt)
        return from_parts if all(text in from_parts for text in texts) else prompt

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        values = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(**(self._special_tokens | values))
        except _RefusedError as error:
            raise InputError(f"the chat template refuses the conversation: {error}") from error
        except SecurityError as error:
            raise CheckpointError(
                f"the chat template does what its sandbox forbids ({error}): do not trust this checkpoint"
            ) from error
        except Exception as error:  # a template can fail in as many ways as a program
            raise CheckpointError(
                f"the chat template fails on this conversation ({type(error).__name__}: {error}): check the "
                "roles and contents of the messages, or correct chat_template.jinja"
            ) from error


def read_template(folder: Path) -> str | None:
    """The chat template of a checkpoint, or None: from the first of the places that transformers knows.

    Those are `processor_config.json`, `chat_template.json`, `chat_template.jinja` and
    `tokenizer_config.json`. Of several named templates, the one called "default" counts.
    """
    for name in ("processor_config.json", "chat_template.json"):
        template = _default((read_json(folder, name) or {}).get("chat_template"), folder / name)
        if template is not None:
            return template
    template = read_text(folder, "chat_template.jinja")
    if template is not None:
        return template
    name = "tokenizer_config.json"
    return _default((read_json(folder, name) or {}).get("chat_template"), folder / name)


def _default(value: Any, path: Path) -> str | None:
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict):
        value = value.get("default")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{path}: chat_template is a {type(value).__name__}: expected a text")
    return value


def split_conversation(conversation: Any, name: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Checks a conversation. Returns its messages as plain JSON values, and its images in order.

    Raises InputError, naming the conversation by `name`, for anything that is not a list of messages as
    `Processor.chat` describes them.
    """
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise InputError(f"{name} is not a list of messages: give [{{'role': 'user', 'content': ...}}]")
    messages: list[dict[str, Any]] = []
    images: list[Any] = []
    for number, message in enumerate(conversation):
        where = f"{name}, message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"{where} is not a message: give {{'role': 'user', 'content': ...}}")
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = [_split_part(part, f"{where}, part {i}", images) for i, part in enumerate(content)]
            messages.append(_plain(message, where) | {"content": parts})
        elif content is None or isinstance(content, str):
            messages.append(_plain(message, where))
        else:
            raise InputError(f"{where} has a content of type {type(content).__name__}: give a str or a list of parts")
    return messages, images


def _split_part(part: Any, where: str, images: list[Any]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _plain(part, where)
    if kind == "image":
        keys = [key for key in ("image", "path") if part.get(key) is not None]
        if len(keys) != 1 or not is_image_like(part[keys[0]]):
            asked = " (a URL is not fetched: download the image)" if "url" in part else ""
            raise InputError(
                f"{where} is an image part with the keys {sorted(map(str, part))}{asked}: give {{'type': "
                "'image', 'image': a PIL image, an array or a path}"
            )
        images.append(part[keys[0]])
        # Templates see that there is an image, never the image.
        return _plain({key: value for key, value in part.items() if key != keys[0]}, where) | {keys[0]: "image"}
    raise InputError(
        f"{where} is neither {{'type': 'text', 'text': ...}} nor {{'type': 'image', 'image': ...}}: "
        f"{str(kind or part)[:80]!r} is not supported"
    )


def _plain(message: Message, where: str) -> dict[str, Any]:
    # As in transformers, an entry of None counts as absent; a copy through JSON leaves the template no object
    # to misuse.
    entries = {key: value for key, value in message.items() if value is not None and key != "content"}
    try:
        entries = json.loads(json.dumps(entries))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where} holds something that is not plain text, numbers or lists ({error})") from error
    return entries | ({"content": message["content"]} if message.get("content") is not None else {})


class _RefusedError(jinja2.TemplateError):
    """What `raise_exception` raises in a template."""


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is only passed through."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's protocol)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # Jinja would go on with an undefined value and complain only if that is used further.
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a prompt must not have.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
