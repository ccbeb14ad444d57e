"""The page about methods of one's own: its code runs, is short, and does what it says."""

import re
from pathlib import Path

import method_references as reference
import numpy as np
from stub_model import KV_HEADS, LAYERS, StubModel, kept_sets, stub_batch, stub_params

import vlcache_jax as vlc
from vlcache_jax.demo.study.methods import Method, all_methods
from vlcache_jax.policies import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "own_method.md"


def test_the_page(monkeypatch):
    monkeypatch.setitem(METHODS, "value_aware", None)  # taken away at the end
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL).group(1)
    statements = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(statements) <= 30
    names = {"__name__": "own_method"}
    exec(compile(code, str(PAGE), "exec"), names)
    policy = names["ValueAware"](0.4, power=2.0)
    assert policy == names["ValueAware"](0.4, power=2.0)
    assert policy != names["ValueAware"](0.4)
    assert policy == vlc.policy_by_name("value_aware:0.4,power=2.0")
    assert Method("value_aware") in all_methods()
    assert Method("value_aware").label == "Attention times value"
    batch = stub_batch()
    params = stub_params(batch)
    _, state = vlc.prefill(StubModel(), params, batch, policy).start(4)
    kept = kept_sets(state)
    for row, n in enumerate(batch.lengths):
        cut = {name: np.asarray(x[:, row, :n], np.float64) for name, x in params.items()}
        prompt = reference.Prompt(**cut, index=batch.vision_index[row, :n])
        size = np.linalg.norm(prompt.value, axis=-1).swapaxes(1, 2)
        scores = prompt.received(prompt.question()) * size**2
        share = scores.mean(axis=1) / scores.mean(axis=1).sum(axis=1, keepdims=True)
        slots = reference.in_proportion(1 / (share**2).sum(axis=1), max(LAYERS, LAYERS * n * 4 // 10), 1, n)
        assert state.allocation.requested[row].tolist() == slots
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                assert kept[layer][row][head] == reference.keep(scores[layer, head], slots[layer], sinks=4)
