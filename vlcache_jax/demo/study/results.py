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
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlcache_jax.demo.study.result_lines import UNITS, parse_line
from vlcache_jax.errors import InputError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.files.reading import read_plain
from vlcache_jax.files.writing import append_line, check_target, cut, make_folder

FILE = "results.jsonl"
_BEGINNING = b'{"kind":"'  # of every line
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
        values = {name: getattr(self, name) for name in UNITS}
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
            **{name: _pack(values[name], unit) for name, unit in UNITS.items()},
        }

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> "Result":
        """The reverse of `line`, rounded as it was written."""
        count = len(line["exact"])
        fields: dict[str, Any] = {name: np.array([float(x) for x in line[name]]) for name in ("exact", "agrees")}
        fields |= {name: _unpack(line[name], unit, count) for name, unit in UNITS.items()}
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

        The rest of a line that a killed run was writing is dropped, with a warning: what it held is measured again.

        Args:
          folder: where it lies; created if need be.
          study: what is measured; must be what an earlier run measured.

        Raises:
          InputError: the file holds another study, or no study at all, a line is damaged, or it cannot be written.
        """
        self.path = folder / FILE
        self.results: dict[Key, Result] = {}
        self.kept: dict[tuple[str, str, float], dict[str, Any]] = {}
        self.runs: list[dict[str, Any]] = []
        self._layers: int | None = None  # of the first result
        self._seen: dict[Key, int] = {}  # the line of each result
        make_folder(folder)
        if check_target(self.path) is None or not self._read(study):
            self._write({"kind": "study", **study})

    def add_run(self, run: dict[str, Any]) -> None:
        """Notes that a run begins."""
        self._write({"kind": "run", **run})

    def add(self, result: Result) -> None:
        """Appends a configuration's samples."""
        self._write(result.line())

    def add_kept(self, task: str, method: str, budget: float, **values: Any) -> None:
        """Appends what one sample kept."""
        self._write({"kind": "kept", "task": task, "method": method, "budget": budget, **values})

    def _write(self, line: dict[str, Any]) -> None:
        append_line(self.path, json.dumps(line, separators=(",", ":")))
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        match line["kind"]:
            case "result":
                result = Result.from_line(line)
                self.results[result.key] = result
            case "kept":
                self.kept[line["task"], line["method"], line["budget"]] = line
            case "run":
                self.runs.append(line)

    def _read(self, study: dict[str, Any]) -> int:
        """Takes the lines of the file, and drops what follows the last line break. Returns how many lines there are."""
        try:
            data = read_plain(self.path)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({error}): choose another --output") from error
        whole, _, rest = data.rpartition(b"\n")
        texts = whole.split(b"\n") if len(rest) < len(data) else []
        for number, text in enumerate(texts, 1):
            self._take(self._checked(number, text, study))
        if rest:
            begun = rest[:40].replace(b" ", b"")
            if not (begun.startswith(_BEGINNING) or _BEGINNING.startswith(begun)):
                raise self._damaged(len(texts) + 1, f"it begins with {shorten(rest[:20].decode('latin-1'))}")
            warnings.warn(
                f"{self.path}, line {len(texts) + 1} was cut off when a run was stopped: it is dropped, and what it "
                "held is measured again",
                stacklevel=3,
            )
            cut(self.path, len(data) - len(rest))
        return len(texts)

    def _checked(self, number: int, text: bytes, study: dict[str, Any]) -> dict[str, Any]:
        """Line `number`, from 1 on. Raises InputError if it is damaged, or does not fit those before it."""
        samples = study.get("samples")
        try:
            line = parse_line(text, samples if isinstance(samples, int) else None)
            if (line["kind"] == "study") != (number == 1):
                raise ValueError("it says what is measured" if number > 1 else "line 1 must say what is measured")
            layers = len(line["layers"]) if "layers" in line else None
            if layers is not None and layers != (self._layers or layers):
                raise ValueError(f"it has {layers} layers, those before it have {self._layers}")
            self._layers = self._layers or layers
            if line["kind"] == "result":
                key = Key(*(line[name] for name in Key._fields))
                if key in self._seen:
                    raise ValueError(f"it repeats line {self._seen[key]}, {', '.join(map(str, key))}")
                self._seen[key] = number
        except ValueError as error:
            raise self._damaged(number, str(error)) from error
        if number == 1:
            self._check_study(line, study)
        return line

    def _damaged(self, number: int, why: str) -> InputError:
        return InputError(
            f"{self.path}, line {number} is no result of a study: {why}; remove the line (a result that is missing "
            "is measured again), restore the file, or choose another --output"
        )

    def _check_study(self, line: dict[str, Any], study: dict[str, Any]) -> None:
        for name, value in json.loads(json.dumps(study)).items():
            if line.get(name) != value:
                raise InputError(
                    f"{self.path} holds a study with {name}={shorten(line.get(name))}, not {value!r}: choose another "
                    "--output, or the same --samples and checkpoint"
                )
