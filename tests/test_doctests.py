"""The examples in docstrings of the library run and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import vlcache_jax

ROOT = Path(vlcache_jax.__file__).parent
MODULES = sorted(
    ".".join(("vlcache_jax", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)
EXAMPLES = 10  # at least; raise it with new ones


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    tests = [test for name in MODULES for test in finder.find(importlib.import_module(name))]
    assert sum(len(test.examples) for test in tests) >= EXAMPLES
