"""Vision-language models in JAX/Flax with a compressed, fixed-shape KV cache.

The public names are those of `vlcache_jax.public`. They are imported at the first use of one, since that takes JAX and
seconds, and `vlcache-jax --help` or its first line of progress must not wait for it.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlcache_jax.public import *  # noqa: F403
    from vlcache_jax.public import __all__  # noqa: F401
else:

    def __getattr__(name: str) -> Any:
        if name != "__all__" and name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if find_spec(f"{__name__}.{name}") is not None:  # `from vlcache_jax import ops` asks here first
            return import_module(f"{__name__}.{name}")
        public = import_module(f"{__name__}.public")
        if name != "__all__" and name not in public.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(public, name)
        return value


def __dir__() -> list[str]:
    return sorted({*import_module("vlcache_jax.public").__all__, *globals()})
