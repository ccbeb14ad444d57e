"""Masks of one's own, or of trained gates (SeerAttention, arXiv 2410.13276), as a function."""

import dataclasses
from collections.abc import Callable

import jax

from vlcache_jax.errors import PolicyError
from vlcache_jax.patterns.pattern import Chosen, Pattern, PatternInputs


@dataclasses.dataclass(frozen=True)
class BlockMask(Pattern):
    """The blocks that a function says.

    Attributes:
      function: `PatternInputs` -> bool [batch or 1, heads or kv_heads or 1, blocks, blocks], (queries, keys), inside
        `jit` and in every layer; `inputs.layer` and `inputs.heads` are the numbers of the layer and its heads. Or a
        `Chosen`, which may have ranks and single columns, of which a list holds `most_columns`.
      most_columns: room for single columns.
      rows: how many of the prompt's last rows' attention the function wants (`inputs.last`).
      heads, capacity, min_tokens, dense_layers, block: see `Pattern`.

    Raises:
      PolicyError: no function, or a value out of range.

    Example:
      near = lambda inputs: (inputs.distance & (inputs.distance - 1) == 0)[None, None]  # PowerAttention: 0, 1, 2, 4 ...
      out = vlc.generate(vlm.model, vlm.params, batch, prefill=vlc.BlockMask(near))
    """

    function: Callable[[PatternInputs], jax.Array | Chosen]
    most_columns: int = 0
    rows: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise PolicyError(f"BlockMask({self.function!r}): give a function of PatternInputs")

    @property
    def last_rows(self) -> int:
        return self.rows

    def columns(self, length: int) -> int:
        return min(self.most_columns, length)

    def choose(self, inputs: PatternInputs) -> Chosen:
        found = self.function(inputs)
        return found if isinstance(found, Chosen) else Chosen(blocks=found)
