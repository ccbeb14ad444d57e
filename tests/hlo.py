"""Reading a compiled program's text: its loops, and what one device says to others inside and outside of them."""

import dataclasses
import re

_HEAD = re.compile(r"^(?:ENTRY )?(%[\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=(%[\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_PLACE = re.compile(r'op_name="([^"]*)"')
_LOOP = re.compile(r" while\(.*condition=(%[\w.\-]+), body=(%[\w.\-]+)")
_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|"
    r"collective-broadcast)(?:-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop: `place` is the name of its operation in the source, `depth` how many loops it lies in."""

    place: str
    depth: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """Something that several devices do together.

    Attributes:
      kind: such as "all-reduce".
      shape: of its result, as the compiler writes it.
      place: the name of its operation in the source.
      depth: how many loops it lies in.
    """

    kind: str
    shape: str
    place: str
    depth: int


def loops(text: str) -> list[Loop]:
    """All loops of an optimised program, `compiled.as_text()`."""
    return [Loop(_place(line), depth) for line, depth in _lines(text) if _LOOP.search(line)]


def collectives(text: str) -> list[Collective]:
    """All collectives of an optimised program, `compiled.as_text()`."""
    found = [(_COLLECTIVE.search(line), line, depth) for line, depth in _lines(text)]
    return [Collective(match[2], match[1], _place(line), depth) for match, line, depth in found if match]


def _place(line: str) -> str:
    found = _PLACE.search(line)
    return found[1] if found else ""


def _lines(text: str) -> list[tuple[str, int]]:
    """The lines of all computations that the program reaches, each with the number of loops around it."""
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = head[1]
            computations[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif line == "}":
            current = ""
        elif current:
            computations[current].append(line)
    found, waiting = [], [(entry, 0)]
    while waiting:
        name, depth = waiting.pop()
        for line in computations.get(name, ()):
            found.append((line, depth))
            called = _CALLED.findall(line) + [x.strip() for names in _BRANCHES.findall(line) for x in names.split(",")]
            waiting += [(other, depth + bool(_LOOP.search(line))) for other in called]
    return found
