"""What is asked of every row of a batch, as arrays: another temperature, stop id or length compiles nothing."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import InputError
from vlcache_jax.files.exporting import exportable
from vlcache_jax.inference.sampling import Sampling
from vlcache_jax.parallel.seeds import Seeds, seed_words
from vlcache_jax.typing import ModelSpec

Samplings = Sampling | Sequence[Sampling | None] | None
"""How to draw: None for greedy decoding; one for all rows, or one for each."""

StopIds = Sequence[int] | Sequence[Sequence[int]] | None
"""Ids that end a row: for all rows, or a list for each; None for the checkpoint's."""

_ALL = np.iinfo(np.int32).max
_FEWEST_STOP_IDS = 8


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class RowOptions:
    """How each row draws, and when it ends.

    Attributes:
      seeds: u32 [rows, 2], words of `parallel.seeds`.
      temperature: f32 [rows]; 0 for greedy decoding.
      top_k: i32 [rows]; the vocabulary's size or more for no limit.
      top_p: f32 [rows]; 1 for no limit.
      stop_ids: i32 [rows, n]; filled with -1, which is no token.
      max_new_tokens: i32 [rows].
      log_probabilities: bool [rows], whether those of its tokens are wanted.
    """

    seeds: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    stop_ids: jax.Array
    max_new_tokens: jax.Array
    log_probabilities: jax.Array

    def stops(self, token: jax.Array) -> jax.Array:
        """bool [rows]: whether a row ends with its token, i32 [rows]."""
        return jnp.any(token[:, None] == self.stop_ids, axis=1)


def row_options(
    spec: ModelSpec,
    rows: int,
    max_new_tokens: int,
    sampling: Samplings = None,
    seeds: Seeds = 0,
    eos_token_ids: StopIds = None,
    most_stop_ids: int | None = None,
    log_probabilities: bool = False,
) -> RowOptions:
    """The arrays that a user's words mean; in numpy, but for seeds that are JAX's.

    Args:
      spec: of the model, for its stop ids.
      rows: how many.
      max_new_tokens: of every row.
      sampling, seeds, eos_token_ids, log_probabilities: as in `generate`.
      most_stop_ids: for how many there is room; as many as are needed by default.

    Raises:
      InputError: seeds, sampling or stop ids that are none, or other than rows in number.
    """
    each = [sampling] * rows if sampling is None or isinstance(sampling, Sampling) else list(_sequence(sampling))
    for one in each:
        if one is not None and not isinstance(one, Sampling):
            raise InputError(f"sampling={one!r} is no vlc.Sampling: give one, one for each row, or None")
    if len(each) != rows:
        raise InputError(f"{len(each)} samplings do not fit {rows} rows: give one, or one for each")
    arrays: Any = {
        "seeds": seed_words(seeds, (rows,)),
        "temperature": np.array([s.temperature if s else 0 for s in each], np.float32),
        "top_k": np.array([min(_ALL, s.top_k) if s and s.top_k else _ALL for s in each], np.int32),
        "top_p": np.array([s.top_p if s and s.top_p else 1 for s in each], np.float32),
        "stop_ids": _stop_ids(rows, spec.eos_token_ids if eos_token_ids is None else eos_token_ids, most_stop_ids),
        "max_new_tokens": np.full(rows, max_new_tokens, np.int32),
        "log_probabilities": np.full(rows, bool(log_probabilities)),
    }
    return RowOptions(**arrays)


def _sequence(sampling: Any) -> Sequence[Any]:
    if not isinstance(sampling, Sequence) or isinstance(sampling, str):
        raise InputError(f"sampling={sampling!r} is no vlc.Sampling: give one, one for each row, or None")
    return sampling


def _stop_ids(rows: int, ids: Any, room: int | None) -> np.ndarray:
    ids = list(ids)
    of_rows = ids if ids and all(np.ndim(x) == 1 for x in ids) else [ids] * rows
    if len(of_rows) != rows:
        raise InputError(f"eos_token_ids of {len(of_rows)} rows do not fit {rows}: give one list, or one for each row")
    most = max((len(x) for x in of_rows), default=0)
    room = max(_FEWEST_STOP_IDS, 1 << max(0, most - 1).bit_length()) if room is None else room
    if most > room:
        raise InputError(f"{most} stop ids are more than the {room} that the state has room for")
    padded = np.full((rows, room), -1, np.int32)
    for row, own in enumerate(of_rows):
        padded[row, : len(own)] = [int(i) for i in own]
    return padded
