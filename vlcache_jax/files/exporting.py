"""Our pytrees through `jax.export`: their static fields as JSON, without pickle.

    step = jax.jit(lambda params, batch: vlc.prefill(model, params, batch, policy).start(64))
    data = jax.export.export(step)(params, batch).serialize()
    logits, state = jax.export.deserialize(data).call(params, batch)  # elsewhere: first from vlcache_jax import Context

What may stand in a static field is marked by `static_field`. Reading makes objects of these classes alone, from their
fields.
"""

import dataclasses
import json
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import export

from vlcache_jax.errors import InputError

T = TypeVar("T")

_CLASSES: dict[str, type] = {}
_NOT_FIELDS = ("parent", "name")  # of a Flax module


def exportable(kind: type[T]) -> type[T]:
    """A class decorator: registers a pytree dataclass with `jax.export`."""
    return export.register_pytree_node_serialization(
        kind,
        serialized_name=f"vlcache_jax.{kind.__name__}",
        serialize_auxdata=lambda static: _to_bytes(kind, static),
        deserialize_auxdata=lambda data: _from_text(json.loads(data)),
    )


def static_field(kind: type[T]) -> type[T]:
    """A class decorator: objects of this frozen dataclass may stand in static fields of what is exported."""
    _CLASSES[kind.__name__] = kind
    return kind


def _to_bytes(kind: type, static: Any) -> bytes:
    try:
        return json.dumps(_as_text(static)).encode()
    except TypeError as error:
        remedy = "export a function of its arrays instead: of a KVState, say, which holds no model"
        raise InputError(f"a {kind.__name__} cannot be exported: {error}; {remedy}") from None


def _as_text(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return {"tuple": [_as_text(x) for x in value]}
    kind: type = type(value)
    name = kind.__name__
    if _CLASSES.get(name) is kind:
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in _NOT_FIELDS}
        return {"class": name, "fields": {key: _as_text(x) for key, x in fields.items()}}
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    if isinstance(getattr(value, "dtype", None), np.dtype):  # jnp.float32
        return {"scalar": jnp.dtype(value).name}
    raise TypeError(f"its static {type(value).__module__}.{name} is none of {', '.join(_CLASSES)}")


def _from_text(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_from_text(x) for x in value["tuple"])
    if "dtype" in value:
        return jnp.dtype(value["dtype"])
    if "scalar" in value:
        return {kind.dtype.name: kind for kind in (jnp.float32, jnp.bfloat16, jnp.float16)}[value["scalar"]]
    return _CLASSES[value["class"]](**{key: _from_text(x) for key, x in value["fields"].items()})
