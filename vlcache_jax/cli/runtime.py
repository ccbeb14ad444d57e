"""What a run ran on."""

import platform
from typing import Any

import jax


def describe_runtime() -> dict[str, Any]:
    """Versions and device, for JSON output."""
    import flax

    import vlcache_jax

    device = jax.devices()[0]
    versions = {
        "vlcache_jax": vlcache_jax.__version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
    }
    return {
        "versions": versions,
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
    }
