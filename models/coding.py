"""How the weights of a decoder's projections are coded, where they are not floats."""

import dataclasses

from vlcache_jax.errors import InputError
from vlcache_jax.files.exporting import static_field


@static_field
@dataclasses.dataclass(frozen=True)
class WeightCoding:
    """Whole numbers of a few bits with a scale for each output feature and group of input channels.

        weight[i, o] = (codes[i, o] - zeros[group of i, o]) * scales[group of i, o]

    Attributes:
      bits: 8 or 4.
      group: consecutive input channels that share a scale; a projection whose channels it does not divide has groups
        of half of it, or a quarter, and so on. None: all channels of a feature share one.
      shifted: whether there are zeros; without them codes are symmetric about 0.

    Raises:
      InputError: another number of bits, or a group that is no positive whole number.

    Example:
      vlm = vlc.load(folder, weights=vlc.WeightCoding(4, group=64))
    """

    bits: int
    group: int | None = None
    shifted: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise InputError(f"WeightCoding(bits={self.bits!r}): use 8 or 4")
        if self.group is not None and (type(self.group) is not int or self.group < 1):
            raise InputError(f"WeightCoding(group={self.group!r}): use a positive whole number, or None")

    def __str__(self) -> str:
        group = "" if self.group is None else f" in groups of {self.group}"
        return f"{self.dtype}{group}{' with zeros' if self.shifted else ''}"

    @property
    def dtype(self) -> str:
        """Of the codes."""
        return f"int{self.bits}"

    def groups(self, channels: int) -> int:
        """How many groups so many input channels have."""
        size = channels if self.group is None else min(self.group, channels)
        while channels % size:
            size = size // 2 if size % 2 == 0 else 1
        return channels // size

    def shapes(self, channels: int, features: int) -> dict[str, tuple[tuple[int, int], str]]:
        """The parameters of a projection in place of its kernel [channels, features]: shapes and types by name."""
        table = (self.groups(channels), features), "float32"
        return {"codes": ((channels, features), self.dtype), "scales": table} | (
            {"zeros": table} if self.shifted else {}
        )


CODED = ("codes", "scales", "zeros")
"""Names of the parameters of a coded projection, its bias apart."""

WEIGHTS = {"int8": WeightCoding(8), "int4": WeightCoding(4, 128)}
"""By the word that `load` and the command line take."""


def weight_coding(weights: "str | WeightCoding | None") -> WeightCoding | None:
    """A coding by its word; None and "float" are none. Raises InputError if there is no such word."""
    if weights is None or isinstance(weights, WeightCoding) or weights == "float":
        return weights if isinstance(weights, WeightCoding) else None
    if weights not in WEIGHTS:
        raise InputError(f"weights={weights!r} is not known: use {', '.join(WEIGHTS)}, float, or a vlc.WeightCoding")
    return WEIGHTS[weights]
