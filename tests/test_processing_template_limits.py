"""Chat templates are programs from a checkpoint: whatever they do ends soon, in little memory, in a named error."""

import concurrent.futures
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files import limits
from vlcache_jax.models.text import template_process
from vlcache_jax.models.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi there"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"

# What only the memory, the sandbox or the parser bounds ends at once.
BOMBS = {
    "string": "{{ 'a' * 3000000000 }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "list doubling": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "range": "{{ range(10**12) | list }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "format width": "{{ '{:>1000000000}'.format(1) }}",
    "format filter": "{{ '%999999999s' | format('a') }}",
    "center": "{{ 'a' | center(10**9) }}",
    "filter block": "{% filter center(10**9) %}a{% endfilter %}",
    "batch": "{{ range(99999) | batch(10**9, 'x') | list }}",
    "replace": "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "translate": "{{ ('a' * 10**6).translate({97: 'b' * 10**6}) }}",
    "join": "{{ range(99999) | join('a' * 10**6) }}",
    "map": "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
    "tojson": "{{ [[[[1]]]] | tojson(indent=10**9) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ '1'.zfill(10**10) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "encode": "{{ ('a'.encode() * 10**10).decode() }}",
    "joiner": "{% set j = joiner('a' * 10**7) %}{% for i in range(99999) %}{{ j() }}{% endfor %}",
    "cycler": "{% set c = cycler('a' * 10**8, 'b') %}{% for i in range(99999) %}{{ c.next() }}{% endfor %}",
    "prompt": "{{ 'abc' * 5000000 }}",
    "growth": "{{ 'abc' * 500000 }}",
    "macro": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "recursive loop": "{% for a in [[[]]] recursive %}{{ loop([a]) }}{% endfor %}",
    "dunder": "{{ 'a'.encode().__mul__(10**9) }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "break": "{% break %}",
    "blocks": "{% for a in [1] %}" * 25 + "x" + "{% endfor %}" * 25,
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "brackets": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "signs": "{{ " + "-" * 200_000 + "1 }}",
    "source": "{{ 1 }}" * 200_000,
}
# These take the whole of the time.
SLOW_BOMBS = {
    "loops": LOOP.replace("BODY", ""),
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "slice": "{{ range(99999) | slice(10**9) | list }}",
}


@pytest.mark.parametrize(
    "name",
    [*BOMBS, "loops", *(pytest.param(name, marks=pytest.mark.thorough) for name in SLOW_BOMBS if name != "loops")],
)
def test_bombs(name):
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate((BOMBS | SLOW_BOMBS)[name]).render(MESSAGES)
    assert time.monotonic() - start < limits.TEMPLATE_WALL_SECONDS + 5
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, "kilobytes, of this process"
    # A process as large as the limit leaves no trace: the next prompt is rendered as ever.
    assert ChatTemplate("{{ messages[0].content }}").render(MESSAGES) == "hi there"


def test_the_clock_counts_where_the_processor_time_does_not(monkeypatch):
    monkeypatch.setattr(limits, "TEMPLATE_WALL_SECONDS", 0.3)
    with pytest.raises(CheckpointError, match="by the clock"):
        ChatTemplate(SLOW_BOMBS["loops"]).render(MESSAGES)


def test_processor_time_counts_whatever_the_parent_does_with_its_signal():
    """A child inherits which signals are ignored and blocked. (Not in this process: libtpu has plans of its own.)"""
    script = (
        f"import signal, sys; sys.path[:0] = {sys.path!r}\n"
        "from vlcache_jax.files import limits\n"
        "from vlcache_jax.models.text.chat_template import ChatTemplate\n"
        "signal.signal(signal.SIGPROF, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})\n"
        "limits.TEMPLATE_WALL_SECONDS = 200\n"
        "try:\n"
        f"    ChatTemplate({SLOW_BOMBS['loops']!r}).render({MESSAGES!r})\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "processor time" in done.stdout, done


def test_a_refusal_is_cut_short():
    with pytest.raises(InputError, match="refuses") as caught:
        ChatTemplate("{{ raise_exception('a' * 10**6) }}").render(MESSAGES)
    assert len(str(caught.value)) < 1000


def test_one_process_serves_many_prompts_and_threads():
    templates = [ChatTemplate(f"{number} {{{{ messages[0].content }}}}") for number in range(20)]
    worker = template_process.SHARED._process
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        prompts = list(pool.map(lambda template: template.render(MESSAGES), templates * 5))
    assert prompts == [f"{number} hi there" for number in range(20)] * 5
    assert template_process.SHARED._process is worker


def test_a_process_that_somebody_ended_is_replaced():
    template = ChatTemplate("{{ messages[0].content }}")
    worker = template_process.SHARED._process
    worker.kill()
    worker.wait()
    assert template.render(MESSAGES) == "hi there"
    assert template_process.SHARED._process is not worker


def test_a_forked_child_gets_a_process_of_its_own():
    template = ChatTemplate("{{ messages[0].content }}")
    worker = template_process.SHARED._process
    script = (
        f"import os, sys; sys.path[:0] = {sys.path!r}\n"
        "from vlcache_jax.models.text import template_process\n"
        "from vlcache_jax.models.text.chat_template import ChatTemplate\n"
        "template = ChatTemplate('{{ messages[0].content }}')\n"
        "mine = template_process.SHARED._process.pid\n"
        "if os.fork() == 0:\n"
        "    assert template_process.SHARED._process is None\n"
        "    assert template.render([{'role': 'user', 'content': 'child'}]) == 'child'\n"
        "    os._exit(template_process.SHARED._process.pid == mine)\n"
        "assert os.wait()[1] == 0\n"
        "assert template.render([{'role': 'user', 'content': 'parent'}]) == 'parent'\n"
        "assert template_process.SHARED._process.pid == mine\n"
        "print(mine)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    time.sleep(0.1)
    with pytest.raises(ProcessLookupError):  # it ended with its parent
        os.kill(int(done.stdout), 0)
    assert template_process.SHARED._process is worker
    assert template.render(MESSAGES) == "hi there"


def test_ctrl_c_leaves_no_answer_behind():
    slow = ChatTemplate("{% for a in range(99999) %}{% endfor %}{{ messages[0].content }}")
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        [slow.render(MESSAGES) for _ in range(10_000)]
    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": "again"}]) == "again"


def _render(template):
    return template.render(MESSAGES)


def test_spawned_processes_render_too():
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<s>"})
    assert pickle.loads(pickle.dumps(template)).render(MESSAGES) == "<s>hi there"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_render, (template,)) == "<s>hi there"


def test_without_an_interpreter_the_error_says_so(monkeypatch):
    template_process.SHARED.close()
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(CheckpointError, match=r"could not be started .*sys\.executable"):
        ChatTemplate("{{ 1 }}")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(CheckpointError, match=r"could not be started"):
        ChatTemplate("{{ 1 }}")
