"""Conversations to plain messages, which a chat template may see, and their images and videos, which it may not."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vlcache_jax.errors import InputError
from vlcache_jax.models.images.data_url import check_data_url, is_url
from vlcache_jax.models.images.frame_sampling import FrameSampling
from vlcache_jax.models.images.opening import is_image_like
from vlcache_jax.models.images.video import Video

_KEYS = ("image", "path", "url", "base64")
_VIDEO_KEYS = ("video", "path", "times", "fps", "num_frames", "min_frames", "max_frames")
_BESIDE = object()  # stands for an image or a video that is given beside the conversation
_GIVE_VIDEO = (
    "give {'type': 'video', 'video': a vlc.Video, the path of a file, or a list of frames with 'times' or 'fps' beside "
    "it}; or {'type': 'video'} and the video by images="
)
_GIVE = (
    "give {'type': 'image', 'image': a PIL image, an array, a path or a data URL}, or {'type': 'image'} and the images "
    "of the conversation by images="
)


def split_conversation(
    conversation: Any, name: str, beside: Sequence[Any] | None = None, sampling: FrameSampling | None = None
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Checks a conversation. Returns its messages as plain JSON values, and its images and videos in order.

    Args:
      conversation: messages as `Processor.chat` describes them.
      name: how errors call it.
      beside: the images of its parts `{"type": "image"}` in order; or, if no part is an image, those of the image
        tokens that its texts hold.
      sampling: which frames of a video file are taken; None: the model takes no videos.

    Raises InputError for anything else, or if there are more or fewer images beside it than places for them.
    """
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise InputError(f"{name} is not a list of messages: give [{{'role': 'user', 'content': ...}}]")
    messages: list[dict[str, Any]] = []
    images: list[Any] = []
    for number, message in enumerate(conversation):
        where = f"{name}, message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"{where} is not a message: give {{'role': 'user', 'content': ...}}")
        apart = next((key for key in ("image", "images") if message.get(key) is not None), None)
        if apart is not None:
            raise InputError(f"{where} has its images under {apart!r}, where no template looks: {_GIVE}")
        content = message.get("content")
        others = _plain({key: value for key, value in message.items() if key != "content"}, where)
        if isinstance(content, (list, tuple)):
            parts = [_split_part(part, f"{where}, part {i}", images, sampling) for i, part in enumerate(content)]
            messages.append(others | {"content": parts})
        elif content is None:
            messages.append(others)
        elif isinstance(content, str):
            messages.append(others | {"content": str(content)})
        else:
            raise InputError(f"{where} has a content of type {type(content).__name__}: give a str or a list of parts")
    return messages, _with_those_beside(images, beside, name)


def _with_those_beside(images: list[Any], beside: Sequence[Any] | None, name: str) -> list[Any]:
    places = sum(image is _BESIDE for image in images)
    if not images and beside:
        return list(beside)  # for image tokens in the texts, which are counted in the prompt
    if places != len(beside or ()):
        raise InputError(
            f"{name} has {places} parts {{'type': 'image'}} without an image, and {len(beside or ())} images were "
            f"given beside it: {_GIVE}"
        )
    rest = iter(beside or ())
    return [next(rest) if image is _BESIDE else image for image in images]


def _split_part(part: Any, where: str, images: list[Any], sampling: FrameSampling | None) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _plain(part, where)
    if kind == "image_url":  # OpenAI's
        value = part.get("image_url")
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str) or not is_url(url):
            raise InputError(
                f"{where} is an image_url part without a URL: give {{'type': 'image_url', 'image_url': {{'url': "
                "'data:image/png;base64,...'}}, or for a file {'type': 'image', 'image': its path}"
            )
        check_data_url(url, where)
        images.append(url)
        return {"type": "image", "image": "image"}
    if kind == "image":
        keys = [key for key in _KEYS if part.get(key) is not None]
        if len(keys) > 1 or (keys and not _is_image(keys[0], part[keys[0]])):
            raise InputError(f"{where} is an image part with the keys {sorted(map(str, part))}: {_GIVE}")
        images.append(_image(keys[0], part[keys[0]], where) if keys else _BESIDE)
        # Templates see that there is an image, never the image.
        others = _plain({key: value for key, value in part.items() if key not in _KEYS}, where)
        return others | {keys[0] if keys else "image": "image"}
    if kind == "video" and sampling is not None:
        images.append(_video(part, where, sampling))
        return _plain({k: v for k, v in part.items() if k not in _VIDEO_KEYS}, where) | {"video": "video"}
    raise InputError(
        f"{where} is neither {{'type': 'text', 'text': ...}} nor {{'type': 'image', 'image': ...}}: "
        f"{str(kind or part)[:80]!r} is not supported"
    )


def _video(part: Mapping[str, Any], where: str, sampling: FrameSampling) -> Any:
    """The video of a part, or `_BESIDE`. Raises InputError."""
    given = {key: part[key] for key in _VIDEO_KEYS if part.get(key) is not None}
    sources = [given.pop(key) for key in ("video", "path") if key in given]
    if not sources and not given:
        return _BESIDE
    source = sources[0] if len(sources) == 1 else None
    if isinstance(source, (str, os.PathLike)) and "times" not in given:
        try:
            changed = sampling.changed(**given)
        except TypeError as error:
            raise InputError(f"{where}: {given} is no sampling: give numbers") from error
        return Video.from_file(source, changed)
    if isinstance(source, Video) and not given:
        return source
    listed = isinstance(source, (list, tuple)) or hasattr(type(source), "__array__")
    if listed and set(given) <= {"times", "fps"}:
        return Video(source, **given)  # type: ignore[arg-type]
    raise InputError(f"{where} is a video part with the keys {sorted(map(str, part))}: {_GIVE_VIDEO}")


def _is_image(key: str, value: Any) -> bool:
    return is_image_like(value) if key in ("image", "path") else isinstance(value, str)


def _image(key: str, value: Any, where: str) -> Any:
    if key == "base64":
        return f"data:image/png;base64,{value}"  # whatever the format, which is read from the bytes
    if key == "url":
        check_data_url(value, where)  # a path is none
    return value


def _plain(entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    # As in transformers, an entry of None counts as absent; a copy through JSON leaves the template no object
    # to misuse.
    try:
        return json.loads(json.dumps({key: value for key, value in entries.items() if value is not None}))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where} holds something that is not plain text, numbers or lists ({error})") from error
