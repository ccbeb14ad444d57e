"""What says which tensor of a checkpoint is which parameter, as data."""

import dataclasses

LINEAR = (1, 0)
"""Axes that turn a torch linear weight [out, in] into a kernel [in, out]."""
CONVOLUTION = (2, 3, 1, 0)
"""Axes that turn a torch convolution weight [out, in, h, w] into a kernel [h, w, in, out]."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor, or one for each layer if `{layer}` is in its name.

    Attributes:
      name: Canonical name in the checkpoint.
      path: Keys in the parameter tree, where layers are stacked along the first axis.
      axes: `checkpoint_tensor.transpose(axes)` is the parameter; None leaves it as it is.
    """

    name: str
    path: tuple[str, ...]
    axes: tuple[int, ...] | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    def ours(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the parameter (of one layer) for a checkpoint tensor's shape."""
        return shape if self.axes is None else tuple(shape[a] for a in self.axes)

    def theirs(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor for the shape of the parameter (of one layer)."""
        return shape if self.axes is None else tuple(shape[self.axes.index(i)] for i in range(len(shape)))
