"""The folder of an evaluation: what was measured, and a line for each sample that has been answered.

    run.json             what is asked of which model; another cannot be measured into the same folder
    NAME.jsonl           the samples that one policy has answered, as they finished
    NAME.runs.jsonl      what each start of the program did: sizes, counts, versions
    NAME.divergence.jsonl  how far it is from another policy, along that one's answers (`fidelity`)
    part-0-of-4/         the same files, of the first of four programs that share the samples

A line is on the disk before the next one begins. Of a program that was killed at most the last line is unfinished: it
is not read, and its sample is answered again.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlcache_jax.errors import InputError
from vlcache_jax.files.json_text import parse_json, shorten
from vlcache_jax.files.reading import read_plain
from vlcache_jax.files.writing import append_line, make_folder, write_text

RUN = "run.json"
_LINE_BYTES = 2**28


class RunFolder:
    """An evaluation on the disk.

    Attributes:
      path: of the folder.
      settings: what `run.json` says.
      own: where this program writes: the folder, or that of its part.
    """

    def __init__(self, path: Path, settings: dict[str, Any], part: str = "") -> None:
        self.path, self.settings, self.own = path, settings, path / part

    @classmethod
    def begin(cls, path: Path, settings: dict[str, Any], part: str = "") -> "RunFolder":
        """Opens a folder for these settings, or makes one; and one in it for a part of the samples.

        Raises:
          InputError: it holds another evaluation; the message tells the differences.
        """
        make_folder(path / part)
        if not (path / RUN).exists():
            if any(path.glob("*.jsonl")):
                raise InputError(f"{path} holds .jsonl files but no {RUN}: choose another folder")
            write_text(path / RUN, json.dumps({"settings": settings}, indent=1) + "\n")
        folder = cls(path, cls.open(path).settings, part)
        names = sorted({*folder.settings, *settings})
        pairs = [(name, folder.settings.get(name), settings.get(name)) for name in names]
        different = [f"{name} was {shorten(a)}, now {shorten(b)}" for name, a, b in pairs if a != b]
        if different:
            raise InputError(f"{path} holds another evaluation ({'; '.join(different)}): choose another folder")
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Opens a folder to read it.

        Raises:
          InputError: there is none, or it holds no evaluation.
        """
        try:
            settings = parse_json(read_plain(path / RUN))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no evaluation: {RUN} cannot be read ({error})") from error
        return cls(path, settings)

    def policies(self) -> list[str]:
        """Those that have answered something, by name."""
        others = (".runs.jsonl", ".divergence.jsonl")
        files = [path for path in self._files("*.jsonl") if not path.name.endswith(others)]
        names = (next((line["policy"] for line in _lines(path)), None) for path in files)
        return sorted({name for name in names if name is not None})

    def results(self, policy: str) -> dict[str, dict[str, Any]]:
        """A policy's lines by the ids of their samples; of several for one, the first."""
        found: dict[str, dict[str, Any]] = {}
        for file in self._files(_name(policy)):
            for line in _lines(file):
                if line["policy"] == policy:
                    found.setdefault(line["id"], line)
        return found

    def add(self, policy: str, line: dict[str, Any]) -> None:
        """Appends a sample's line."""
        append_line(self.own / _name(policy), json.dumps({**line, "policy": policy}, ensure_ascii=False))

    def divergences(self, policy: str, compare: str) -> dict[str, dict[str, Any]]:
        """A policy's lines beside the answers of another, by the ids of their samples."""
        lines = (line for file in self._files(_name(policy, ".divergence")) for line in _lines(file))
        return {line["id"]: line for line in lines if (line["policy"], line.get("compared")) == (policy, compare)}

    def add_divergence(self, policy: str, compare: str, line: dict[str, Any]) -> None:
        """Appends a sample's line."""
        append_line(
            self.own / _name(policy, ".divergence"), json.dumps({**line, "policy": policy, "compared": compare})
        )

    def starts(self, policy: str) -> list[list[dict[str, Any]]]:
        """What each start of the program did for a policy, in each part."""
        return [list(_lines(file)) for file in self._files(_name(policy, ".runs"))]

    def add_start(self, policy: str, line: dict[str, Any]) -> None:
        """Appends what this one did."""
        append_line(self.own / _name(policy, ".runs"), json.dumps({**line, "policy": policy, "id": ""}))

    def sizes(self, policy: str) -> dict[str, Any] | None:
        """The buckets and rows of this part's first start, with which all others go on: then they answer alike."""
        starts = _lines(self.own / _name(policy, ".runs"))
        return next((line["sizes"] for line in starts if "sizes" in line), None)

    def buckets(self) -> list[list[int]] | None:
        """The sizes that prompts are padded to, where a policy or a part has begun: they are all asked the same."""
        starts = (line for policy in self.policies() for part in self.starts(policy) for line in part)
        return next((line["sizes"]["buckets"] for line in starts if "sizes" in line), None)

    def _files(self, pattern: str) -> list[Path]:
        """Of all parts."""
        return sorted([*self.path.glob(pattern), *self.path.glob(f"part-*/{pattern}")])


def _name(policy: str, kind: str = "") -> str:
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', policy)}{kind}.jsonl"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    try:
        texts = read_plain(path).split(b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for text in texts[:-1]:  # behind the last line break there is nothing, or a line that was not finished
        try:
            line = parse_json(text, _LINE_BYTES)
        except ValueError:  # a killed program's, which the next one has closed
            continue
        if isinstance(line, dict) and "id" in line and "policy" in line:
            yield line
