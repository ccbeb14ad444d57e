"""Which way dependencies point, and what may not be imported at all."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPS = {"vlcache_jax": "vlcache_jax", "models": "vlcache_jax.models", "kernels": "vlcache_jax.kernels"}  # as installed
ROOMS = [
    "files", "terminal", "kernels", "parallel", "models", "cache", "policies", "pruning", "patterns", "inference",
    "engine", "serving", "explain", "evaluation", "training", "planning", "demo", "cli",
]  # fmt: skip
"""A room may import those before it, and the hall's errors, types and inputs."""
HALL = {"__init__", "__main__", "errors", "inputs", "public", "typing"}


def modules():
    """The files of the library by the names of their modules."""
    found = {}
    for top, name in TOPS.items():
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imports(path):
    """Absolute names that a file imports, inside functions too: of a name in a module, the module's."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else node.module for name in inside)


def room(name):
    """The room of a module; None in the hall."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] not in HALL else None


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports(name):
    own = room(name)
    for imported in imports(MODULES[name]):
        top = imported.split(".")[0]
        assert top not in {"torch", "transformers", "tensorflow", "pickle", "models", "kernels", "tests"}, imported
        assert "jax._src" not in imported
        assert not imported.startswith("flax.nnx")
        if top != "vlcache_jax" or own is None:
            continue
        other = room(imported)
        if own == "kernels":
            assert other == "kernels", f"{name} imports {imported}: kernels stand alone"
        elif other is None:
            assert imported.split(".")[-1] in ("errors", "inputs", "typing") or own in ("cli", "demo"), imported
        else:
            assert ROOMS.index(other) <= ROOMS.index(own), f"{name} imports {imported}"
        assert other != "demo" or own in ("demo", "cli"), f"{name} imports {imported}: the demo is its own room"


def test_the_hall_holds_the_public_namespace_only():
    assert {path.stem for path in (ROOT / "vlcache_jax").glob("*.py")} == HALL
    folders = {path.parent.name for path in (ROOT / "vlcache_jax").glob("*/__init__.py")} | {"models", "kernels"}
    assert folders == set(ROOMS)


def test_files_are_short():
    for folder in ("vlcache_jax", "models", "tests", "benchmarks"):  # kernels apart
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_no_circle_of_imports():
    """Between modules, names that are imported inside functions included."""
    graph = {name: {other for other in imports(path) if other in MODULES} for name, path in MODULES.items()}
    done, path = set(), []

    def visit(name):
        if name in path:
            raise AssertionError(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            path.pop()
            done.add(name)

    for name in graph:
        if name not in ("vlcache_jax", "vlcache_jax.public"):  # the namespace is looked up lazily
            visit(name)


def test_no_public_name_is_also_a_module():
    """Public names are looked up at their first use: a submodule of the same name, once imported, would hide one."""
    import vlcache_jax as vlc

    names = {path.stem for path in (ROOT / "vlcache_jax").iterdir()} | {"models", "kernels"}
    assert not names.intersection(vlc.__all__)


def test_every_public_name_has_a_docstring_and_a_place_in_the_guide():
    import vlcache_jax as vlc

    guide = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))
    for name in vlc.__all__:
        assert (getattr(vlc, name).__doc__ or "").strip(), name
        assert name in guide, f"{name} is not in docs/"
