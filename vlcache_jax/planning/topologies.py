"""TPU slices to compile for, on a machine without a TPU.

`libtpu` holds the TPU's compiler. It compiles for a topology that is only described, not attached.
"""

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from vlcache_jax.errors import InputError
from vlcache_jax.planning.chips import CHIPS

# libtpu reads these when it is loaded. Without them it asks a metadata server that is not there, and refuses to be
# loaded by two processes at once; on a machine with a TPU it was loaded, with its own settings, long before.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Splits a topology's name.

    Args:
      name: generation and shape, such as "v5e:2x4", "v5p:2x2x1" or "v6e:1x1".

    Returns:
      (generation, shape in chips).

    Raises:
      InputError: an unknown generation (with the nearest) or a malformed shape.

    Example:
      >>> parse_topology("v5e:2x4")
      ('v5e', (2, 4))
    """
    chip, colon, text = name.strip().lower().partition(":")
    if chip not in CHIPS:
        near = difflib.get_close_matches(chip, CHIPS, n=len(CHIPS), cutoff=0.0)
        raise InputError(f"topology {name!r}: {chip!r} is no known TPU: use one of {', '.join(near)}, as in v5e:2x4")
    axes = CHIPS[chip].axes
    if not colon or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", text) or text.count("x") > axes - 1:
        example = "x".join(["2", "2", "1"][:axes])
        raise InputError(
            f"topology {name!r} has no shape that {chip} comes in: give the chips along its {axes} axes, as in "
            f"{chip}:{example}"
        )
    shape = tuple(int(n) for n in text.split("x"))
    return chip, shape + (1,) * (axes - len(shape))


def tpu_devices(name: str) -> list[Any]:
    """The devices of a TPU slice, good for compiling and nothing else.

    Args:
      name: see `parse_topology`. Slices of fewer than four chips are described as one host.

    Returns:
      Devices for a `Mesh`.

    Raises:
      InputError: libtpu is not installed, or it knows no such slice.
    """
    chip, shape = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "the TPU compiler (libtpu) is not installed: on Linux (x86-64) install it with pip install 'jax[tpu]'; no "
            "TPU is needed"
        )
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {}
    if any(size % bound for size, bound in zip(shape, (2, 2, 1))):
        if math.prod(shape) > 8:
            raise InputError(f"topology {name!r}: a slice of several hosts has even numbers of chips along its axes")
        options["chips_per_host_bounds"] = [*shape, 1][:3]
    try:
        return list(
            topologies.get_topology_desc(f"{chip}:{'x'.join(map(str, shape))}", platform="tpu", **options).devices
        )
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"topology {name!r} is refused by the TPU compiler ({reason}): choose another") from error


def make_mesh(devices: Sequence[Any], axes: dict[str, int]) -> Mesh:
    """A mesh over the first devices, its axes named and sized as in `axes`, in Auto mode."""
    count = math.prod(axes.values())
    if count > len(devices):
        raise InputError(f"a mesh of {count} devices ({axes}) does not fit {len(devices)}: make it smaller")
    return Mesh(
        np.asarray(devices[:count]).reshape(tuple(axes.values())), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
    )
