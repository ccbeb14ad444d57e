"""How fast an evaluation ran, from what its starts wrote down; a start that was killed wrote nothing."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vlcache_jax.engine.stats import Stats
from vlcache_jax.evaluation.run_folder import RunFolder
from vlcache_jax.terminal.table import megabytes, percent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What one policy took. The parts of several programs ran at the same time.

    Attributes:
      policy: as typed.
      samples_per_second, tokens_per_second: of all parts together, compiling aside.
      rows: of the decode batches.
      state_bytes: of their buffers.
      idle_rows, padding: shares, see `vlc.engine.Stats`.
      compilations: of all starts.
      devices: such as "8 x TPU v5 lite".
      versions: of jax and vlcache_jax.
    """

    policy: str
    samples_per_second: float
    tokens_per_second: float
    rows: int
    state_bytes: int
    idle_rows: float
    padding: float
    compilations: int
    devices: str
    versions: dict[str, str]


def speed(folder: RunFolder, policy: str) -> Speed | None:
    """Of the starts that ended by themselves; None without any."""
    parts = [[line for line in part if "stats" in line] for part in folder.starts(policy)]
    counted = [[_stats(line["stats"]) for line in part] for part in parts if part]
    if not counted:
        return None
    every = [stats for part in counted for stats in part]
    last = [part[-1] for part in parts if part]

    def rate(name: str) -> float:
        return sum(_ratio(sum(getattr(x, name) for x in part), sum(x.seconds for x in part)) for part in counted)

    def share(used: str, of: str) -> float:
        return 1 - _ratio(sum(getattr(x, used) for x in every), sum(getattr(x, of) for x in every))

    kinds: dict[str, int] = {}
    for line in last:
        kind = str(line.get("device"))
        kinds[kind] = kinds.get(kind, 0) + int(line.get("devices", 1))
    return Speed(
        policy=policy,
        samples_per_second=rate("results"),
        tokens_per_second=rate("tokens"),
        rows=sum(part[-1].rows for part in counted),
        state_bytes=sum(part[-1].state_bytes for part in counted),
        idle_rows=share("decoded", "row_steps"),
        padding=share("prompt_tokens", "padded_tokens"),
        compilations=sum(x.compilations for x in every),
        devices=", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())),
        versions={name: str(last[-1].get(name)) for name in ("jax", "vlcache_jax")},
    )


def _stats(line: dict[str, Any]) -> Stats:
    """Of another version of the library, what this one knows of it."""
    return Stats(**{field.name: line[field.name] for field in dataclasses.fields(Stats) if field.name in line})


def _ratio(a: Any, b: Any) -> float:
    return a / b if b else 0.0


def speed_rows(speeds: Sequence[Speed]) -> list[list[str]]:
    """The cells of a table: a header, and a row for each policy."""
    header = ["policy", "samples/s", "tokens/s", "rows", "of", "idle rows", "padding", "compiled", "devices"]
    return [header] + [
        [
            one.policy,
            f"{one.samples_per_second:.2f}",
            f"{one.tokens_per_second:.1f}",
            str(one.rows),
            megabytes(one.state_bytes),
            percent(one.idle_rows),
            percent(one.padding),
            str(one.compilations),
            one.devices,
        ]
        for one in speeds
    ]
