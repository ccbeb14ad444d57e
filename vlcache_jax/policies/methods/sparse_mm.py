"""SparseMM (Wang et al., arXiv 2506.05344, ICCV 2025): slots for the heads that look at images, found beforehand."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.errors import PolicyError, is_number
from vlcache_jax.files.json_text import parse_json, shorten
from vlcache_jax.files.reading import read_plain
from vlcache_jax.policies.allocate.uniform import Allocate
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.methods.snap_kv import WINDOW, observation_window, snap_score
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.rows.spans import LastRows
from vlcache_jax.policies.scores.attention import LayerInputs
from vlcache_jax.policies.shares import SlotBudget, share_slots
from vlcache_jax.policies.window import Recent, Window, forced, settled
from vlcache_jax.typing import ModelSpec


@dataclasses.dataclass(frozen=True)
class HeadShares(Allocate):
    """Window and a floor for every KV head, the rest of the slots in proportion to what the heads scored beforehand.

    With C slots of a layer and KV head on average, w of them for the window, and b = C - w:

        slots[l, h] = w + floor(part * b) + share of what is left, by score[l, h] among all layers and the lane's heads

    within the prompt's length; what a head cannot use goes to the others, so that they add up exactly (`share_slots`).

    Attributes:
      scores: of the query heads, or KV heads, of each layer without a window; 0 or more. Those of a group of query
        heads are added. None: all alike.
      part: of the slots besides the window that every head gets.
      recent: `Policy.recent`.
    """

    scores: tuple[tuple[float, ...], ...] | None = None
    part: float = 0.1
    recent: Recent = Window(WINDOW)  # noqa: RUF009  # frozen
    per_head = True

    def __post_init__(self) -> None:
        if not is_number(self.part, 0, 1):
            raise PolicyError(f"part={self.part!r} is out of range: give a fraction in [0, 1]")

    def check_model(self, spec: ModelSpec) -> None:
        if self.scores is None:
            return
        layers, heads = len(spec.full_layers), len(self.scores[0])
        if len(self.scores) != layers or heads % spec.num_kv_heads:
            raise PolicyError(
                f"scores are of {len(self.scores)} layers with {heads} heads, but the model has {layers} layers (those "
                f"with a window left out) with {spec.num_kv_heads} KV heads: measure them on this model"
            )

    def measure(self, inputs: LayerInputs, scores: jax.Array) -> Any:
        """Nothing: f32 [batch, kv_heads], for the shapes."""
        return jnp.zeros((inputs.key.shape[0], inputs.key.shape[2]), jnp.float32)

    def slots(self, measured: jax.Array, lengths: jax.Array, budget: SlotBudget) -> jax.Array:
        batch, layers, kv_heads = measured.shape
        group = kv_heads // budget.lanes
        weight = np.ones((layers, kv_heads), np.float32)
        if self.scores is not None:
            weight = np.asarray(self.scores, np.float32).reshape(layers, kv_heads, -1).sum(axis=2)
        weight = weight.reshape(layers, budget.lanes, group).swapaxes(0, 1).reshape(budget.lanes, -1)
        total = jnp.asarray(budget.total(lengths))
        mean = total // layers
        window = jnp.broadcast_to(forced(mean, settled(self.recent, mean))[0], mean.shape)
        least = window + floor_fraction(mean - window, self.part)

        def of_row(total: jax.Array, least: jax.Array, length: jax.Array) -> jax.Array:
            rest = group * (total - layers * least)
            return least + jax.vmap(lambda w: share_slots(w, rest, 0, length - least))(jnp.asarray(weight))

        found = jax.vmap(of_row)(total, least, lengths).reshape(batch, budget.lanes, layers, group)
        return found.swapaxes(1, 2).reshape(batch, layers, kv_heads)


def head_scores(scores: Any) -> tuple[tuple[float, ...], ...]:
    """What `SparseMM` takes for scores: a file of JSON, or the numbers themselves.

    Args:
      scores: a path, or what lies there: a list of a list for each layer, one number for each head; or an object with
        a number, or numbers that are averaged, for each "layer-head", as the authors' files have it.

    Raises:
      PolicyError: there is no such file, or what it holds is none of these.

    Example:
      >>> head_scores({"0-0": 1, "0-1": [2, 4]})
      ((1.0, 3.0),)
    """
    what = "scores"
    if isinstance(scores, str | os.PathLike):
        what = f"scores of {os.fspath(scores)!r}"
        try:
            scores = parse_json(read_plain(scores))
        except (OSError, ValueError) as error:
            raise PolicyError(f"{what}: {error}") from None
    if isinstance(scores, dict):
        heads = sum(name.startswith("0-") for name in scores)
        layers = len(scores) // max(heads, 1)
        wanted = [[f"{layer}-{head}" for head in range(heads)] for layer in range(layers)]
        if not heads or set(scores) != {name for row in wanted for name in row}:
            raise PolicyError(f"{what}: keys must be layer-head, from 0-0 on and equally many heads in each layer")
        scores = [[_mean(scores[name]) for name in row] for row in wanted]
    if not isinstance(scores, Sequence) or not scores or not all(isinstance(row, Sequence) for row in scores):
        raise PolicyError(f"{what}: {shorten(scores)} is no list of layers with a list of heads in each")
    numbers = [x for row in scores for x in row]
    if len({len(row) for row in scores}) > 1 or not all(map(_is_score, numbers)) or not any(numbers):
        raise PolicyError(f"{what}: want equally many numbers of 0 or more for each layer, not all of them 0")
    return tuple(tuple(map(float, row)) for row in scores)


def _mean(x: Any) -> Any:
    return sum(x) / len(x) if isinstance(x, list) and x and all(map(_is_score, x)) else x


def _is_score(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < math.inf


@method("sparse_mm", title="SparseMM")
def SparseMM(
    budget: Budget = DEFAULT_BUDGET,
    *,
    scores: str | os.PathLike[str] | Sequence[Sequence[float]] | None = None,
    part: float = 0.1,
    window: int | None = None,
    pool: int = 5,
    pooling: str = "mean",
    recent: Recent | None = None,
    lanes: int = 1,
    **options: Unpack[Options],
) -> Policy:
    """SnapKV's votes, with most slots for the few heads that look where an answer is read off; see `HeadShares`.

    `benchmarks/head_scores.py` measures the scores: how often a head's largest attention, while a word is written, lies
    on the patches that show it.

    Choices. Without `scores` all heads are alike, and this is SnapKV with equal layers. The authors' code cuts a head's
    slots at the prompt's length; here they go to the others.

    Query-aware in its votes, if the question lies in the last rows.

    Args:
      budget: see `Policy.budget`; a number of tokens is of a layer and KV head on average.
      scores: a file, or the numbers; see `head_scores`.
      part: of the slots besides the window that every head gets.
      window, pool, pooling, recent: as in `SnapKV`.
      lanes: groups of KV heads; slots are shared within a group only. 1: all heads of all layers. See `Policy.lanes`.
      **options: see `Options`. `candidate_fraction` bounds the slots of a head, too.

    Raises:
      PolicyError: an option out of range, a file that holds no such scores, or a window that does not fit into a budget
        in tokens.

    Example:
      >>> SparseMM(scores=[[0.9, 0.1], [0.5, 0.5]]).allocate.scores
      ((0.9, 0.1), (0.5, 0.5))
    """
    count, recent = observation_window(window, recent)
    shares = HeadShares(None if scores is None else head_scores(scores), part, recent)
    return Policy(
        name="sparse_mm",
        budget=budget,
        rows=LastRows(count),
        score=snap_score(pool, pooling, recent=recent),
        allocate=shares,
        recent=recent,
        lanes=lanes,
        **options,
    )
