"""Images inside `data:` URLs, as OpenAI's messages carry them."""

import base64
import binascii
import urllib.parse

from vlcache_jax.errors import InputError
from vlcache_jax.files.limits import DATA_URL_CHARACTERS


def is_url(text: str) -> bool:
    """Whether `text` is a URL of any scheme rather than a path."""
    scheme, colon, rest = text.partition(":")
    is_scheme = scheme[:1].isalpha() and all(c.isalnum() or c in "+-." for c in scheme) and scheme.isascii()
    return bool(colon) and is_scheme and (rest.startswith("//") or scheme.lower() in ("data", "file"))


def check_data_url(url: str, name: str) -> str:
    """What follows the comma of `data:image/...;base64,...` (RFC 2397).

    Raises InputError, naming the image by `name`, for another URL, which is never fetched or opened.
    """
    head, comma, data = url.partition(",")
    scheme, _, media = head.partition(":")
    if scheme.lower() != "data":
        raise InputError(
            f"{name} is a URL ({url[:80]!r}): a URL is not fetched, so download the image and give a data URL or, to a "
            "program on this machine, its path"
        )
    kind, *options = media.lower().split(";")
    if not comma or not kind.strip().startswith("image/") or "base64" not in [option.strip() for option in options]:
        raise InputError(f"{name} is the data URL {head[:80]!r}: expected data:image/png;base64,...")
    if len(data) > DATA_URL_CHARACTERS:
        raise InputError(
            f"{name} is a data URL of {len(data)} characters, the limit is {DATA_URL_CHARACTERS}: give a path"
        )
    return data


def read_data_url(url: str, name: str) -> bytes:
    """The bytes that a data URL holds. Raises InputError as `check_data_url` does, and for broken or empty base64."""
    data = check_data_url(url, name)
    try:
        text = urllib.parse.unquote(data, errors="strict") if "%" in data else data
        content = base64.b64decode("".join(text.split()).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeError) as error:
        raise InputError(f"{name} is a data URL of broken base64 ({error}): encode the image file again") from error
    if not content:
        raise InputError(f"{name} is an empty data URL: put the bytes of an image file into it")
    return content
