"""The direction of dependencies, and what may not be imported at all."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for folder in ("vlcache_jax", "models", "kernels") for p in (ROOT / folder).rglob("*.py"))
CORE = {
    "batch", "budgets", "context", "decoding", "errors", "extending", "fractions", "generation", "interfaces",
    "merging", "packing", "prefilling", "report", "sampling", "selection", "state", "validation",
}  # fmt: skip


def imports(path):
    """Absolute names that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def in_core(path):
    relative = path.relative_to(ROOT)
    return relative.parts[0] == "vlcache_jax" and (relative.stem in CORE or relative.parts[1] == "policies")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    names = set(imports(path))
    relative = path.relative_to(ROOT)
    for name in names:
        top = name.split(".")[0]
        assert top not in {"torch", "transformers", "tensorflow", "pickle", "models", "kernels", "tests"}, name
        assert "jax._src" not in name
        assert not name.startswith("flax.nnx")
        if relative.parts[0] == "kernels" and top == "vlcache_jax":
            assert name.startswith("vlcache_jax.kernels"), name
        if in_core(path):
            outside = ("models", "loading", "training", "cli", "demo", "explain")
            assert not name.startswith(tuple(f"vlcache_jax.{part}" for part in outside)), name
        if relative.parts[0] == "models":
            outside = ("loading", "training", "cli", "demo", "explain", "generation", "prefilling", "decoding")
            assert not name.startswith(tuple(f"vlcache_jax.{part}" for part in outside)), name


def test_no_public_name_is_also_a_module():
    """Public names are looked up at their first use: a submodule of the same name, once imported, would hide one."""
    import vlcache_jax as vlc

    modules = {path.stem for path in (ROOT / "vlcache_jax").iterdir()} | {"models", "kernels"}
    assert not modules.intersection(vlc.__all__)


def test_every_public_name_has_a_docstring_and_a_place_in_the_guide():
    import vlcache_jax as vlc

    guide = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))
    for name in vlc.__all__:
        assert (getattr(vlc, name).__doc__ or "").strip(), name
        assert name in guide, f"{name} is not in docs/"
