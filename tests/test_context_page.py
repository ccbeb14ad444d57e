"""The page about contexts: its code runs, and the shipped model answers what the page says."""

import re
from pathlib import Path

import pytest

import vlcache_jax as vlc
from vlcache_jax.policies import METHODS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "contexts.md"


@pytest.mark.thorough
def test_the_page(tmp_path, monkeypatch):
    code, scored, rows = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "vlcache_jax").symlink_to(ROOT / "vlcache_jax")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    said = re.search(r"# \[\[(.*)\]\]", code).group(1)
    [answers] = names["vlm"].processor.decode(names["out"])
    assert answers == re.findall(r'"(.*?)"', said)
    assert names["chat"].rows == 3
    again = vlc.extend(names["ctx"], names["questions"]).logits  # of the context as loaded
    assert again.argmax(-1).tolist() == names["out"].tokens[0, :, 0].tolist()
    exec(compile(scored, str(PAGE), "exec"), names)
    assert names["scores"].total.shape == (1, 2)
    assert int(names["scores"].total.argmax()) == 0
    exec(compile(rows, str(PAGE), "exec"), names)
    assert 1 < int(names["state"].step[0]) <= 17


def test_every_policy_has_its_place():
    """Query-aware or not: a new method has to be told apart on the page."""
    table = PAGE.read_text(encoding="utf-8").split("## Which policy")[1].split("## Answers")[0]
    for factory in (method.make for method in METHODS.values()):
        assert f"`{factory.__name__}`" in table
