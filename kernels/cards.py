"""Implementations that are defaults only where the card that they are for is attached."""

import dataclasses
import functools

import jax


@dataclasses.dataclass(frozen=True)
class OnCard:
    """A name in an order of `dispatch`, for NVIDIA GPUs of some compute capabilities.

    A program for CUDA that is made where no GPU is attached may run on any, so it does without. By name an
    implementation is used wherever a program is made.

    Attributes:
      name: of the implementation.
      lowest: the first compute capability that has it, (major, minor).
      end: the first that has it no more.
    """

    name: str
    lowest: tuple[int, int]
    end: tuple[int, int] = (1000, 0)

    def missing(self) -> str | None:
        """Why it is no default here; None if it is."""
        found = compute_capability()
        if found is None:
            return "no NVIDIA GPU is attached"
        if not self.lowest <= found < self.end:
            return f"the attached GPU has compute capability {found[0]}.{found[1]}"
        return None


@functools.cache
def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of the attached NVIDIA GPUs, the lowest if they differ; None if there is none."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    found = (device.compute_capability.split(".") for device in devices)
    return min((int(major), int(minor)) for major, minor in found)
