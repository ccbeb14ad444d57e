"""Parts of nested parameters by their paths: what is trained, and what stays as it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from vlcache_jax.errors import InputError

Params = dict[str, Any]


def split(params: Params, trainable: Sequence[str] | None) -> tuple[Params, Params]:
    """(trainable, frozen) parts of nested parameters.

    Args:
      params: a nested dict.
      trainable: path prefixes like "decoder" or "decoder/layers/attention"; None for everything.

    Raises:
      InputError: a prefix names nothing.

    Example:
      tuned, frozen = split(vlm.params, ("projector", "decoder/layers/attention"))
    """
    flat = flatten_dict(params, sep="/")
    if trainable is None:
        return params, {}
    if isinstance(trainable, str) or not trainable:
        raise InputError(f"trainable={trainable!r}: give a sequence of path prefixes, such as ('decoder',), or None")
    for prefix in trainable:
        if not any(under(path, prefix) for path in flat):
            raise InputError(
                f"trainable prefix {prefix!r} names no parameter; the top level has {', '.join(sorted(params))}"
            )
    chosen = {path: any(under(path, prefix) for prefix in trainable) for path in flat}
    return (
        unflatten_dict({path: x for path, x in flat.items() if chosen[path]}, sep="/"),
        unflatten_dict({path: x for path, x in flat.items() if not chosen[path]}, sep="/"),
    )


def under(path: str, prefix: str) -> bool:
    """Whether a path such as "decoder/layers/mlp/up/kernel" begins with a prefix of whole names."""
    return path == prefix or path.startswith(prefix.rstrip("/") + "/")


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> Params:
    """The inverse of `split`: both trees in one, whose nested dicts are joined. Where both have a leaf, that of `b`."""
    return unflatten_dict(flatten_dict(a) | flatten_dict(b))
