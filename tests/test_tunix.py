"""tunix's rollout interface: beside a small fake of it; and, in the thorough tier, a GRPO run in tunix itself."""

import abc
import dataclasses
import importlib
import os
import site
import subprocess
import sys
import types
import venv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vlcache_jax as vlc
from tests.tiny_models import tiny_llava
from vlcache_jax.demo.assets import demo_assets

ROOT = Path(__file__).parent.parent
IMPORTED = [
    "clu",
    "google-metrax",
    "jaxtyping",
    "pandas",
    "perfetto",
    "sentencepiece",
    "tensorboardX",
    "wrapt",
    "wadler_lindig",
]
"""What tunix imports for `tunix_grpo.py`, JAX, Flax and transformers aside."""


@dataclasses.dataclass
class RolloutConfig:
    max_tokens_to_generate: int = 5
    temperature: float = 1.0
    top_p: float | None = 1.0
    top_k: int | None = -1
    seed: jax.Array | None = None
    max_prompt_length: int = 12
    eos_tokens: list[int] | None = None
    return_logprobs: bool = True


@dataclasses.dataclass
class RolloutOutput:
    text: list[str]
    logits: list | None
    tokens: list[np.ndarray]
    left_padded_prompt_tokens: np.ndarray
    logprobs: list[np.ndarray] | None


@pytest.fixture(scope="module")
def tunix():
    """The module, made upon the fake."""
    fakes = {
        "tunix": {},
        "tunix.rl": {"common": types.ModuleType("tunix.rl.common")},
        "tunix.rl.common": {},
        "tunix.rl.rollout": {},
        "tunix.rl.rollout.base_rollout": {
            "BaseRollout": abc.ABC,
            "RolloutConfig": RolloutConfig,
            "RolloutOutput": RolloutOutput,
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, members in fakes.items():
            module = types.ModuleType(name)
            vars(module).update(members, __path__=[])
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("vlcache_jax.training.tunix_rollout")
        sys.modules.pop("vlcache_jax.training.tunix_rollout")


class Letters:
    """A token for each letter."""

    def encode(self, text):
        return [ord(letter) - ord("a") + 5 for letter in text]

    def decode(self, ids):
        return "".join(chr(i - 5 + ord("a")) for i in ids if i >= 5)

    def dedup_bos_ids(self, ids):
        return ids

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


@pytest.fixture(scope="module")
def vlm():
    model, params = tiny_llava()
    return types.SimpleNamespace(model=model, params=params)


@pytest.fixture(scope="module")
def actor(tunix, vlm):
    return tunix.Actor(vlm)


def joined(prompts, answers):
    """Rows as tunix joins them, and what it makes of them: i32 [rows, 17], mask bool [rows, 17, 17]."""
    tail = np.zeros((len(answers), 5), np.int32)
    for row, answer in zip(tail, answers, strict=True):
        row[: len(answer)] = answer
    tokens = np.concatenate([prompts, tail], axis=1)
    real = tokens != 0
    return tokens, real[:, None] & np.tril(np.ones((17, 17), bool))


def test_logits_of_rows_padded_on_both_sides(actor, vlm):
    rng = np.random.default_rng(0)
    prompts, answers, plain = np.zeros((5, 12), np.int32), [], []
    for row, (size, new) in enumerate([(12, 5), (1, 1), (7, 0), (3, 5), (11, 2)]):
        prompts[row, 12 - size :] = rng.integers(5, 60, size)
        answers.append(rng.integers(5, 60, new))
        plain.append([*prompts[row, 12 - size :], *answers[-1]])
    tokens, mask = joined(prompts, answers)
    logits, cache = actor(jnp.asarray(tokens), jnp.zeros_like(tokens), None, jnp.asarray(mask))
    assert cache is None
    for row, ids in enumerate(plain):
        batch = vlc.Batch(
            np.asarray([ids], np.int32), np.asarray([len(ids)], np.int32), np.full((1, len(ids)), -1, np.int32),
            np.zeros((1, 0, 16, 16, 3), np.float32),
        )  # fmt: skip
        alone = vlm.model.apply({"params": vlm.params}, batch, method="forward")[0]
        start = 12 - (prompts[row] != 0).sum()
        np.testing.assert_allclose(logits[row, start : start + len(ids)], alone, atol=2e-5)


def test_rollouts_have_the_log_probabilities_that_the_actor_gives_them(tunix, actor):
    """With the full cache; each answer of a group is another one, and the order is that of the prompts."""
    out = tunix.Rollout(actor, Letters()).generate(
        ["what", "what", "what", "isthat", "isthat", "isthat"], RolloutConfig()
    )
    assert len({tuple(row) for row in out.tokens}) == 6
    assert [Letters().decode(row) for row in out.tokens] == out.text
    assert [Letters().decode(row) for row in out.left_padded_prompt_tokens] == ["what"] * 3 + ["isthat"] * 3
    assert (out.left_padded_prompt_tokens[:, -1] != 0).all()
    tokens, mask = joined(out.left_padded_prompt_tokens, out.tokens)
    logs = jax.nn.log_softmax(actor(jnp.asarray(tokens), jnp.zeros_like(tokens), None, jnp.asarray(mask))[0])
    for row, (said, own) in enumerate(zip(out.tokens, out.logprobs, strict=True)):
        expected = logs[row, np.arange(11, 11 + len(said)), said]
        np.testing.assert_allclose(own, expected, atol=2e-5)


def test_groups_are_as_each_prompt_alone(tunix, actor):
    """A group of prompts that follow one another is read once; unequal groups are read one by one."""
    greedy = RolloutConfig(temperature=0.0)
    make = lambda: tunix.Rollout(actor, Letters(), policy=vlc.VLCache(0.5))  # noqa: E731
    grouped = make().generate(["what", "what", "isthat", "isthat"], greedy)
    apart = make().generate(["what", "isthat", "isthat", "what"], greedy)
    for one, other in ((0, 0), (1, 3), (2, 1), (3, 2)):
        np.testing.assert_array_equal(grouped.tokens[one], apart.tokens[other])


def test_draws_differ_from_call_to_call_and_not_from_run_to_run(tunix, actor):
    for seed in (None, jax.random.key(3), jax.random.PRNGKey(3)):
        config, prompts = RolloutConfig(seed=seed), ["what", "what"]
        first, second = (tunix.Rollout(actor, Letters()) for _ in range(2))
        a, b, again = first.generate(prompts, config), first.generate(prompts, config), second.generate(prompts, config)
        assert a.text != b.text
        assert a.text == again.text


def test_a_learner_s_parameters_are_taken(tunix, vlm):
    own, learner = tunix.Actor(vlm), tunix.Actor(vlm)
    rollout = tunix.Rollout(own, Letters())
    nnx.update(learner, jax.tree.map(lambda x: 2 * x, nnx.state(learner, nnx.Param)))
    sent = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(learner, nnx.Param))
    rollout.update_params(sent, (nnx.Param,))
    for new, old in zip(jax.tree.leaves(rollout.model().params), jax.tree.leaves(vlm.params), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new, (2 * old).astype(jnp.bfloat16).astype(old.dtype))


def test_prompts_that_are_too_long_are_cut_and_said(tunix, actor):
    with pytest.warns(UserWarning, match=r"a prompt of 15 tokens is cut to its last 12 \(max_prompt_length\)"):
        out = tunix.Rollout(actor, Letters()).generate(["abcdefghijklmn"], RolloutConfig())
    assert Letters().decode(out.left_padded_prompt_tokens[0]) == "cdefghijklmn"


def test_bad_input(tunix, actor, vlm):
    with pytest.raises(vlc.InputError, match="the rollout actor is a SimpleNamespace: give an Actor"):
        tunix.Rollout(vlm, Letters())
    with pytest.raises(vlc.InputError, match="no cache, and no packed rows"):
        actor(jnp.zeros((1, 4), jnp.int32), None)
    apart = dataclasses.replace(vlm.model, layout="apart")
    with pytest.raises(vlc.InputError, match='layout="stacked"'):
        tunix.Actor(types.SimpleNamespace(model=apart, params=vlm.params))
    codes = vlm.params | {"more": jnp.zeros(3, jnp.int8)}
    with pytest.raises(vlc.InputError, match="codes of weights"):
        tunix.Actor(types.SimpleNamespace(model=vlm.model, params=codes))


@pytest.mark.thorough
def test_in_tunix_itself(tmp_path):
    """Its GRPO learner raises the reward of answers from a compressed cache, in an environment beside this one.

    Not all that tunix asks for: that is data sets and tokenizers which no line of this run imports.
    """
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env" / "lib").glob("python3*/site-packages")
    (packages / "this.pth").write_text(
        "\n".join(f"import site; site.addsitedir({path!r})" for path in site.getsitepackages())
    )
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "google-tunix==0.1.7", *IMPORTED], check=True)
    script = ROOT / "tests" / "tunix_grpo.py"
    plain = {key: x for key, x in os.environ.items() if not key.startswith("JAX_NUMPY")}  # and the suite's devices
    done = subprocess.run(
        [python, script, demo_assets(None) / "demo_model"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=900,
        env=plain,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *rewards, behind = map(float, done.stdout.split()[-11:])
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2, rewards
    assert behind == 0
