"""Several processes of JAX, each with devices and work of its own."""

import jax
from jax.experimental import multihost_utils

from vlcache_jax.errors import InputError


def join(address: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins JAX's processes, of which one that dies does not end the others, unless it is the first one.

    Args:
      address: HOST:PORT of the first process. By default TPU pods, Slurm, Open MPI and Kubernetes tell all three.
      count: of processes.
      index: of this one, from 0 on.

    Raises:
      InputError: no environment tells, the others did not come, or JAX has begun to compute.
    """
    try:
        jax.config.update("jax_enable_recoverability", True)
        jax.distributed.initialize(address, count, index)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"JAX's processes cannot be joined ({error}): on TPU pods, Slurm and Open MPI start one on each host, and "
            "elsewhere tell each one the address of the first, their number and its own"
        ) from error


def wait_for_others() -> None:
    """Returns when all processes are here, but for those that died: the first one must outlive the others."""
    with multihost_utils.live_devices(jax.devices()):
        pass
