"""The API reference in docs/api/ is the one that the docstrings give, and leaves no public name out."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def make_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_current(make_api: ModuleType) -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")}
    made = make_api.pages()
    stale = sorted(name for name in there.keys() | made.keys() if there.get(name) != made.get(name))
    assert not stale, f"docs/api is not what the docstrings say ({', '.join(stale)}): run `{make_api.COMMAND}`"


def test_every_public_name_is_in_it(make_api: ModuleType) -> None:
    pages = make_api.pages()
    for module in ("public", "evaluation.metrics", "training", "planning"):
        for name in make_api.exported(module):
            assert f"[`{name}`](" in pages["README.md"], name
            assert any(f"\n## {name}\n" in page for page in pages.values()), name


def test_every_link_of_the_index_leads_somewhere(make_api: ModuleType) -> None:
    pages = make_api.pages()
    for line in pages["README.md"].split("](")[1:]:
        page, _, anchor = line.split(")")[0].partition("#")
        assert not anchor or anchor in [h[3:].lower() for h in pages[page].splitlines() if h.startswith("## ")]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One line.", "One line.\n"),
        (
            "Does it.\n\nArgs:\n  x: f32 [n], a very\n    long text.\n  **options: others.\n\nReturns:\n  It.",
            "Does it.\n\n**Args**\n\n* `x`: f32 [n], a very long text.\n* `**options`: others.\n\n**Returns** It.\n",
        ),
        (
            "Maths.\n\n    x = y\n\nExample:\n  >>> 1 + 1\n  2",
            "Maths.\n\n    x = y\n\n**Example**\n\n```python\n>>> 1 + 1\n2\n```\n",
        ),
    ],
)  # fmt: skip
def test_docstrings_become_markdown(make_api: ModuleType, docstring: str, expected: str) -> None:
    assert make_api._text(docstring) == expected
