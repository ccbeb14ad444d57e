"""The results as JSON lines, to which an interrupted study appends.

A line of kind "study" says what was measured; one of kind "run" with which versions and on what, whenever a run begins;
one of kind "result" holds all samples of one (task, method, budget, mode), as short as they can be written:

    {"kind": "result", "task": "documents", "method": "vl_cache", "budget": 0.1, "mode": "known", ...
     "exact": "1101...", "agrees": "1101...", "score": [100, 75, ...], "mass": [...], "hits": [...], "kept": [...]}

`exact` and `agrees` have one digit for each sample; `score`, `mass`, `hits` (in hundredths) and `kept` (in 1/10,000 of
the prompt's cache) one whole number, null where there is nothing to measure. Where all samples have the same number it
is written once; so is the mean of `kept` where samples differ by less than 0.2 % of the cache, as rounding lengths
makes them. Lines of kind "kept" hold what pictures are drawn from.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlcache_jax.errors import InputError

FILE = "results.jsonl"
_UNITS = {"score": 100, "mass": 100, "hits": 100, "kept": 10_000}
_ALIKE = 0.002  # kept fractions that differ by less


class Key(NamedTuple):
    """What identifies a configuration."""

    task: str
    method: str
    budget: float
    mode: str


@dataclasses.dataclass(frozen=True)
class Result:
    """A configuration's samples; arrays f64 [samples].

    Attributes:
      key: which configuration.
      exact: 1 where the answer is right word for word.
      score: the task's own.
      agrees: 1 where the tokens are those of the full cache.
      mass: see `measure.Held`.
      hits: likewise.
      kept: kept fraction of the prompt's cache.
      layers: kept fraction of each layer, averaged over samples, f64 [layers].
      density: of each layer's attention, likewise; 1 where the policy does not measure it.
      state_bytes: bytes of the buffers that hold one prompt.
      full_bytes: the same without compression.
      seconds: what it took.
    """

    key: Key
    exact: np.ndarray
    score: np.ndarray
    agrees: np.ndarray
    mass: np.ndarray
    hits: np.ndarray
    kept: np.ndarray
    layers: np.ndarray
    density: np.ndarray
    state_bytes: int
    full_bytes: int
    seconds: float

    def line(self) -> dict[str, Any]:
        """As it is written."""
        values = {name: getattr(self, name) for name in _UNITS}
        if np.ptp(self.kept) < _ALIKE:
            values["kept"] = np.full_like(self.kept, self.kept.mean())
        return {
            "kind": "result",
            **self.key._asdict(),
            "state_bytes": self.state_bytes,
            "full_bytes": self.full_bytes,
            "seconds": round(self.seconds, 2),
            "layers": [round(float(x), 4) for x in self.layers],
            "density": [float(f"{x:.4g}") for x in self.density],
            **{name: "".join(str(int(x)) for x in getattr(self, name)) for name in ("exact", "agrees")},
            **{name: _pack(values[name], unit) for name, unit in _UNITS.items()},
        }

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> "Result":
        """The reverse of `line`, rounded as it was written."""
        count = len(line["exact"])
        fields: dict[str, Any] = {name: np.array([float(x) for x in line[name]]) for name in ("exact", "agrees")}
        fields |= {name: _unpack(line[name], unit, count) for name, unit in _UNITS.items()}
        fields |= {name: np.array(line[name]) for name in ("layers", "density")}
        fields |= {name: line[name] for name in ("state_bytes", "full_bytes", "seconds")}
        return cls(key=Key(*(line[name] for name in Key._fields)), **fields)


def _pack(values: np.ndarray, unit: int) -> list[int | None] | int | None:
    whole = [None if np.isnan(x) else round(float(x) * unit) for x in values]
    return whole[0] if len(set(whole)) == 1 else whole


def _unpack(values: Any, unit: int, count: int) -> np.ndarray:
    whole = values if isinstance(values, list) else [values] * count
    return np.array([np.nan if x is None else x / unit for x in whole])


class ResultFile:
    """The lines of a study, and the file they are appended to.

    Attributes:
      results: by their keys, in the order in which they were measured.
      kept: lines of kind "kept" by (task, method, budget).
      runs: lines of kind "run".
    """

    def __init__(self, folder: Path, study: dict[str, Any]) -> None:
        """Opens the file, or begins it.

        Args:
          folder: where it lies; created if need be.
          study: what is measured; must be what an earlier run measured.

        Raises:
          InputError: the file holds another study, or no study at all, or cannot be written.
        """
        self.path = folder / FILE
        self.results: dict[Key, Result] = {}
        self.kept: dict[tuple[str, str, float], dict[str, Any]] = {}
        self.runs: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self._read()
            self._check(lines, study)
            for line in lines:
                self._take(line)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--output {str(folder)!r} cannot be written ({error}): choose another folder") from error
        if not lines:
            self._write({"kind": "study", **study})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def add_run(self, run: dict[str, Any]) -> None:
        """Notes that a run begins."""
        self._write({"kind": "run", **run})

    def add(self, result: Result) -> None:
        """Appends a configuration's samples."""
        self._write(result.line())

    def add_kept(self, task: str, method: str, budget: float, **values: Any) -> None:
        """Appends what one sample kept."""
        self._write({"kind": "kept", "task": task, "method": method, "budget": budget, **values})

    def _take(self, line: dict[str, Any]) -> None:
        match line["kind"]:
            case "result":
                result = Result.from_line(line)
                self.results[result.key] = result
            case "kept":
                self.kept[line["task"], line["method"], line["budget"]] = line
            case "run":
                self.runs.append(line)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(line)

    def _read(self) -> list[dict[str, Any]]:
        """The lines of the file. What follows the last line break, the rest of a killed write, is cut off."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        lines = []
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(text)
                if not isinstance(line, dict) or "kind" not in line:
                    raise ValueError("not an object with a kind")
            except ValueError as error:
                raise InputError(
                    f"{self.path}, line {number} is no result of a study ({error}): restore the file, or choose "
                    "another --output"
                ) from error
            lines.append(line)
        return lines

    def _check(self, lines: list[dict[str, Any]], study: dict[str, Any]) -> None:
        if not lines:
            return
        there = {name: lines[0].get(name) for name in study}
        for name, value in json.loads(json.dumps(study)).items():
            if there[name] != value:
                raise InputError(
                    f"{self.path} holds a study with {name}={there[name]!r}, not {value!r}: choose another --output, "
                    "or the same --samples and checkpoint"
                )
