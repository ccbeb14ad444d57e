"""Several processes of JAX, each with devices and work of its own."""

import contextlib

import jax
from jax.experimental.multihost_utils import ProcessFailureError, live_devices

from vlcache_jax.errors import InputError

_SILENT = 30  # seconds; then a process has died


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
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=_SILENT)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"JAX's processes cannot be joined ({error}): on TPU pods, Slurm and Open MPI start one on each host, and "
            "elsewhere tell each one the address of the first, their number and its own"
        ) from error


def leave() -> None:
    """Leaves the others when all are here, but for those that died. The first one, whom they need, leaves last."""
    _wait_for_others()
    if jax.process_index() == 0:
        _wait_for_others()  # until they have left: none of them is there to meet
    else:
        jax.distributed.shutdown()


def _wait_for_others() -> None:
    with contextlib.suppress(ProcessFailureError), live_devices(jax.devices()):
        pass
