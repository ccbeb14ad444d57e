"""What says which tensor of a checkpoint is which parameter, as data."""

import dataclasses
import functools
import re
from collections.abc import Callable

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

    def theirs(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor for the shape of the parameter (of one layer)."""
        return shape if self.axes is None else tuple(shape[self.axes.index(i)] for i in range(len(shape)))


def linear(name: str, *path: str) -> list[Rule]:
    """The rules of a torch linear layer, with or without a bias."""
    return [Rule(f"{name}.weight", (*path, "kernel"), LINEAR), Rule(f"{name}.bias", (*path, "bias"))]


def layer_norm(name: str, *path: str) -> list[Rule]:
    """The rules of a torch layer norm."""
    return [Rule(f"{name}.weight", (*path, "scale")), Rule(f"{name}.bias", (*path, "bias"))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightRules:
    """Which tensors a family's checkpoints hold.

    Attributes:
      rules: one for each parameter that a model of the family can have.
      rename: a tensor's name as `rules` has it: checkpoints of one family come with several layouts of names.
      module: a name of `rules` as transformers 5 names its modules, which those of adapters go by.
      ignored: names (renamed, with `{layer}`) that hold nothing a model needs.
      shortened: first keys of the parameters whose later layers may lie unused in the checkpoint.
      written: tensors that no parameter holds but other programs look for, by their names: the path of the parameter
        whose shape they take, and the value they are filled with.
    """

    rules: tuple[Rule, ...]
    rename: Callable[[str], str]
    module: Callable[[str], str] = lambda name: name
    ignored: frozenset[str] = frozenset()
    shortened: frozenset[str] = frozenset()
    written: tuple[tuple[str, tuple[str, ...], float], ...] = ()

    @functools.cached_property
    def by_name(self) -> dict[str, Rule]:
        """The rules by the names of tensors."""
        return {rule.name: rule for rule in self.rules}

    @functools.cached_property
    def by_path(self) -> dict[tuple[str, ...], Rule]:
        """The rules by the paths of parameters."""
        return {rule.path: rule for rule in self.rules}

    @functools.cached_property
    def _numbered(self) -> re.Pattern[str]:
        starts = {rule.name.partition("{layer}")[0] for rule in self.rules if rule.per_layer}
        return re.compile(f"({'|'.join(map(re.escape, sorted(starts)))})(0|[1-9][0-9]{{0,5}})(?=\\.)")

    def canonical(self, name: str) -> tuple[str, int | None]:
        """A tensor's name as the rules have it, its layer number replaced by `{layer}`, and that number."""
        name = self.rename(name)
        match = self._numbered.match(name)
        return (name, None) if match is None else (f"{match[1]}{{layer}}{name[match.end() :]}", int(match[2]))
