"""Published figures of the TPU generations that the compiler can compile for."""

import dataclasses

GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      hbm_bytes: size of its memory.
      hbm_bytes_per_second: bandwidth of its memory.
      axes: dimensions of a topology, 2 (`2x4`) or 3 (`2x2x1`).
      devices: JAX devices of a chip, as the compiler's topologies show them. They share the chip's memory equally.
    """

    hbm_bytes: int
    hbm_bytes_per_second: float
    axes: int
    devices: int = 1


# HBM capacity and bandwidth per chip, checked on 2026-11-21 against the "System architecture" tables of
#   https://cloud.google.com/tpu/docs/v4      32 GiB, 1200 GBps
#   https://cloud.google.com/tpu/docs/v5e     16 GB, 819 GBps (its newer table rounds to 800 GiBps)
#   https://cloud.google.com/tpu/docs/tpu7x   v5p 95 GiB, 2765 GBps; v6e 32 GiB, 1638 GBps; TPU7x 192 GiB, 7380 GBps
# Google writes GB and GiB for the same sizes; the compiler counts in GiB and keeps some for itself (`Ran out of memory
# ... of 15.75G hbm` on v5e).
# On v4 JAX shows one device per chip, but the compiler's topologies show its two cores apart, half the memory each.
CHIPS = {
    "v4": Chip(32 * GIB, 1200e9, axes=3, devices=2),
    "v5e": Chip(16 * GIB, 819e9, axes=2),
    "v5p": Chip(95 * GIB, 2765e9, axes=3),
    "v6e": Chip(32 * GIB, 1638e9, axes=2),
    "tpu7x": Chip(192 * GIB, 7380e9, axes=3, devices=2),
}
