"""A checkpoint's chat templates: where they are found, and conversations rendered to prompts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files import limits
from vlcache_jax.models.io.files import CheckpointFolder, optional_json, optional_text
from vlcache_jax.models.text import template_process

Message = Mapping[str, Any]

ADDITIONAL = "additional_chat_templates"
"""The folder of named templates beside chat_template.jinja, as transformers 5 writes it."""

_MARK = "8317246905"  # no filter that templates use on texts changes it


class ChatTemplate:
    """One template, rendered as transformers' `apply_chat_template` does, within limits (`limits.py`).

    Templates expect the content of a message as a text, as a list of parts, or as either, and drop or garble the other
    form without an error. Which forms a template takes is found out by rendering a text that is known, once for each
    role; contents of the other form are then converted.

    Raises CheckpointError if the template does not parse, or not within the limits.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        placeholders: Mapping[str, str] | None = None,
    ) -> None:
        if len(source) > limits.TEMPLATE_CHARACTERS:
            raise CheckpointError(
                f"the chat template has {len(source)} characters, the limit is {limits.TEMPLATE_CHARACTERS}: shorten it"
            )
        self._source = source
        self._special_tokens = dict(special_tokens or {})
        self._placeholders = dict(placeholders or {"image": "<image>"})
        self._forms: dict[tuple[str, str], bool] = {}
        _ask({"template": source})

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt of one conversation, whose messages hold nothing but plain JSON values.

        Raises:
          InputError: the template refuses the conversation (by `raise_exception`).
          CheckpointError: the template does what the sandbox forbids, fails, or takes too much time or memory.
        """
        prompt = self._render([self._converted(message) for message in messages], add_generation_prompt)
        given = len(json.dumps(messages, ensure_ascii=False))
        if len(prompt) > 10 * given + limits.TEMPLATE_ADDS:
            raise CheckpointError(
                f"the chat template makes a prompt of {len(prompt)} characters of a conversation of {given}: do not "
                "trust this checkpoint, or correct chat_template.jinja"
            )
        return prompt

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        values = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return _ask({"template": self._source, "values": self._special_tokens | values})

    def _converted(self, message: Message) -> Message:
        """`message` with its content in the form that the template takes."""
        role, content = message["role"], message.get("content")
        if isinstance(content, str):
            if self._takes(role, "text") or not self._takes(role, "parts"):
                return message
            return {**message, "content": [{"type": "text", "text": content}]}
        if not isinstance(content, list):
            return message
        visual = {part["type"] for part in content} & set(self._placeholders)
        if self._takes(role, "parts"):
            lost = {kind for kind in visual if not self._takes(role, kind)}
            if lost == {"video"}:  # only the token is missing, which stands between the other parts
                token = {"type": "text", "text": self._placeholders["video"]}
                return {**message, "content": [token if part["type"] == "video" else part for part in content]}
            if not lost:
                return message
            return {**message, "content": [{"type": "text", "text": self._as_text(content)}]}
        return {**message, "content": self._as_text(content)} if self._takes(role, "text") else message

    def _as_text(self, parts: Sequence[Mapping[str, Any]]) -> str:
        return "\n".join(self._placeholders.get(part["type"]) or part["text"] for part in parts)

    def _takes(self, role: str, form: str) -> bool:
        """Whether the template renders the content of a message of `role` in `form`.

        That is "text", "parts", or parts of which one is an "image" or a "video".
        """
        if (role, form) not in self._forms:
            self._forms[role, form] = self._tries(role, form)
        return self._forms[role, form]

    def _tries(self, role: str, form: str) -> bool:
        part: dict[str, str] = {"type": "text", "text": _MARK}
        content: Any = _MARK if form == "text" else [part]
        token = self._placeholders.get(form)
        if token is not None:
            content = [{"type": form, form: form}, part]
        messages: list[Message] = [{"role": role, "content": content}]
        if role == "system":
            messages = [*messages, self._converted({"role": "user", "content": "1"})]
        elif role != "user":
            messages = [self._converted({"role": "user", "content": "1"}), *messages]
        try:
            prompt = self._render(messages, False)
        except (InputError, _FailureError):
            return False
        # A template that expects a text writes the list itself, as Python does, perhaps in capitals.
        as_python = str(part).lower() in prompt.lower()
        return _MARK in prompt and not as_python and (token is None or token in prompt)


class _FailureError(CheckpointError):
    """The template itself raised an error: it may take the same conversation in another form."""


def _ask(request: dict[str, Any]) -> str:
    answer = template_process.SHARED.ask(request)
    kind, message = answer.get("error"), answer.get("message", "")
    if kind is None:
        return answer["text"]
    if kind == "refused":
        raise InputError(f"the chat template refuses the conversation: {message}")
    if kind == "fails":
        raise _FailureError(
            f"the chat template fails on this conversation ({message}): check the roles and contents of the messages, "
            "or correct chat_template.jinja"
        )
    reason, remedy = {
        "parse": (f"does not parse ({message})", "correct chat_template.jinja"),
        "forbidden": (f"does what its sandbox forbids ({message})", "do not trust this checkpoint"),
        "time": (
            f"takes more than {limits.TEMPLATE_SECONDS} s of processor time, or {limits.TEMPLATE_WALL_SECONDS} s by "
            "the clock",
            "do not trust this checkpoint, or correct chat_template.jinja",
        ),
        "memory": (
            f"takes more than {limits.TEMPLATE_MEGABYTES} MB",
            "do not trust this checkpoint, or correct chat_template.jinja",
        ),
        "length": (f"makes a prompt of {message} characters, the limit is {limits.PROMPT_CHARACTERS}", "correct it"),
        "start": (
            f"needs a process of its own, which could not be started ({message})",
            "write the prompt yourself and call the processor with it",
        ),
    }.get(kind, (f"ended the process that rendered it ({message})", "do not trust this checkpoint"))
    raise CheckpointError(f"the chat template {reason}: {remedy}")


def read_templates(folder: CheckpointFolder) -> dict[str, str]:
    """The chat templates of a checkpoint by name, from the places that transformers 5 reads.

    The first of these that has any counts: `processor_config.json`; `chat_template.json` or `chat_template.jinja`, with
    the files of `additional_chat_templates/`, each called as its file; `tokenizer_config.json`. A template without a
    name is "default".

    Raises CheckpointError for one that is no text, or a file that cannot be read.
    """
    templates = _named(folder, "processor_config.json")
    if not templates:
        templates = _additional(folder)
        legacy, text = _named(folder, "chat_template.json"), _source(folder, "chat_template.jinja")
        templates |= legacy or ({} if text is None else {"default": text})
    return templates or _named(folder, "tokenizer_config.json")


def _additional(folder: CheckpointFolder) -> dict[str, str]:
    path = folder / ADDITIONAL
    if not path.is_dir():
        return {}
    if path.is_symlink() and not folder.allow_links:
        raise CheckpointError(f"{path} is a link: copy the folder there instead")
    inside = CheckpointFolder(path, folder.allow_links)
    names = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".jinja")
    if len(names) > limits.TEMPLATES:
        raise CheckpointError(f"{path} has {len(names)} templates, the limit is {limits.TEMPLATES}: remove some")
    return {name.removesuffix(".jinja"): _source(inside, name) or "" for name in names}


def _source(folder: CheckpointFolder, name: str) -> str | None:
    return optional_text(folder, name, 4 * limits.TEMPLATE_CHARACTERS)  # UTF-8 takes at most four bytes for one


def _named(folder: CheckpointFolder, name: str) -> dict[str, str]:
    value = (optional_json(folder, name) or {}).get("chat_template")
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    named = value if isinstance(value, dict) else {} if value is None else {"default": value}
    for key, template in named.items():
        if not isinstance(key, str) or not isinstance(template, str):
            called = "" if key == "default" else f" {key!r}"
            raise CheckpointError(
                f"{folder / name}: chat_template{called} is a {type(template).__name__}: expected a text"
            )
    return named
