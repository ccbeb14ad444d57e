"""`vlcache-jax serve`, as the `openai` client sees it; and what others may send."""

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import re
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image
from tiny_checkpoints import make_tiny_llava

import vlcache_jax as vlc
from vlcache_jax.cli.main import main
from vlcache_jax.serving.app import ChatServer
from vlcache_jax.serving.limits import Limits
from vlcache_jax.serving.server import bound, url, uvicorn_server
from vlcache_jax.serving.sizes import usual_sizes
from vlcache_jax.serving.text import Delta

ROOM, POLICY = 24, vlc.VLCache(0.5)
ROOT = Path(__file__).parent.parent
GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny_llava(folder)
    return vlc.load(folder, dtype="float32", layout="stacked")  # compiles sooner


@pytest.fixture(scope="module")
def engine(vlm):
    options = {"max_new_tokens": ROOM, "buckets": [(64, 2)], "prefill_rows": 2, "steps": 4}
    engine = vlc.Engine(vlm, POLICY, rows=3, top_log_probabilities=5, **options)
    engine.warmup()
    return engine


@contextlib.contextmanager
def served(vlm, engine, **options):
    """A server on a port of its own, in a thread; its address and uvicorn's server."""
    ready, sock = threading.Event(), bound("127.0.0.1", 0)
    chat = ChatServer(engine, vlm.processor.tokenizer, "tiny", ROOM, **options)
    server = uvicorn_server(chat, 20, 1000, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    assert ready.wait(30)
    try:
        yield url(sock), server
    finally:
        server.should_exit = True
        thread.join(60)
        sock.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(vlm, engine):
    with served(vlm, engine, hosts=["127.0.0.1", "localhost"], limits=Limits(body_bytes=2**20)) as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key="any", max_retries=0) as found:
        yield found


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def image(address, *parts):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}, *parts]}]


def messages(seed, text="w1 w2"):
    return image(picture(seed), {"type": "text", "text": text})


def expected(vlm, seed):
    batch = vlm.processor.chat([messages(seed)])
    return batch, vlc.generate(vlm.model, vlm.params, batch, POLICY, ROOM)


def ask(address, body, headers=None, path="/chat/completions"):
    """The status and the JSON of a reply; the body is sent as it is, if bytes."""
    host, _, rest = address.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", f"/{rest}{path}", data, {"Content-Type": "application/json"} | (headers or {}))
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply.status, json.loads(text) if text.startswith(b"{") else text


def wait_until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_chat_is_answered_as_by_generate(vlm, client):
    batch, out = expected(vlm, 0)
    reply = client.chat.completions.create(messages=messages(0), max_tokens=ROOM, n=2, **GREEDY)
    assert [choice.message.content for choice in reply.choices] == 2 * vlm.processor.decode(out)
    assert {choice.finish_reason for choice in reply.choices} == {"length" if int(out.lengths[0]) == ROOM else "stop"}
    used = (reply.usage.prompt_tokens, reply.usage.completion_tokens)
    assert used == (int(batch.lengths[0]), 2 * int(out.lengths[0]))
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "vlcache_jax"


def test_the_likeliest_tokens(vlm, client):
    """In falling order, as the model's logits behind the answer so far have them; in a stream, too."""
    options = {"messages": messages(4), "temperature": 1.5, "seed": 3, "model": "tiny", "logprobs": True}
    whole = client.chat.completions.create(**options, top_logprobs=3)
    content = whole.choices[0].logprobs.content
    batch = vlm.processor.chat([messages(4)])
    logits, state = vlc.compress(vlm.model, vlm.params, batch, POLICY).start(ROOM)
    sampling = {"sampling": vlc.Sampling(temperature=1.5), "seeds": 3, "log_probabilities": True}
    out = vlc.generate(vlm.model, vlm.params, batch, POLICY, ROOM, **sampling)
    assert len(content) == int(out.lengths[0])
    for i, one in enumerate(content):
        logs = np.asarray(logits[0], np.float64) - np.logaddexp.reduce(np.asarray(logits[0], np.float64))
        best = np.argsort(-logs)[:3]
        decode = vlm.processor.tokenizer.decode
        assert [top.token for top in one.top_logprobs] == [decode([int(x)], skip_special_tokens=False) for x in best]
        np.testing.assert_allclose([top.logprob for top in one.top_logprobs], logs[best], atol=1e-5)
        assert one.logprob == pytest.approx(float(out.log_probabilities[0, i]), abs=1e-5)
        logits, state = vlc.decode_step(vlm.model, vlm.params, out.tokens[:, i], state)
    chunks = client.chat.completions.create(**options, top_logprobs=3, stream=True)
    assert [x for chunk in chunks for c in chunk.choices if c.logprobs for x in c.logprobs.content] == content
    for bad, told in ({"top_logprobs": 6}, "from 0 to 5"), ({"top_logprobs": 2, "logprobs": False}, "logprobs=true"):
        with pytest.raises(openai.BadRequestError, match=told):
            client.chat.completions.create(**options | bad)


def test_the_code_of_the_page(address, capsys):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    code = code.replace("http://127.0.0.1:8000/v1", address).replace('"demo_model"', '"tiny"')
    exec(compile(code.replace('Path("', f'Path("{ROOT}/'), "serving.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_stream_is_the_same_in_pieces(vlm, client):
    options = {"messages": messages(1), "temperature": 2, "seed": 5, "n": 2, "model": "tiny", "logprobs": True}
    whole = client.chat.completions.create(**options)
    stop = whole.choices[0].message.content.split()[5]
    for stops in ({}, {"stop": ["no such text", stop]}):
        whole = client.chat.completions.create(**options, **stops)
        chunks = list(
            client.chat.completions.create(**options, **stops, stream=True, stream_options={"include_usage": True})
        )
        texts, finish, logs = ["", ""], [None, None], [[], []]
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                finish[choice.index] = choice.finish_reason or finish[choice.index]
                logs[choice.index] += choice.logprobs.content if choice.logprobs else []
        assert texts == [choice.message.content for choice in whole.choices]
        assert finish == [choice.finish_reason for choice in whole.choices]
        assert logs == [choice.logprobs.content for choice in whole.choices]
        assert sum(map(len, logs)) == whole.usage.completion_tokens
        assert chunks[-1].usage == whole.usage
        assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 2
    assert finish[0] == "stop"
    assert stop not in texts[0]


def test_pieces_hold_nothing_of_a_stop_text():
    class Letters:
        push = staticmethod(lambda token: chr(token))

    delta = Delta(Letters(), ["<end>", "zz"])
    tokens = [ord(letter) for letter in "a<b<enz<e"]
    assert [delta.push(tokens[: n + 1]) for n in range(len(tokens))] == [
        "a", "", "<b", "", "", "", "<en", "z", ""
    ]  # fmt: skip
    assert delta.finish("a<b<enz<enough") == "<enough"


BAD = {
    "no json": (b"{", 400, "no JSON"),
    "twice": (b'{"model": "tiny", "model": "x"}', 400, "occurs twice"),
    "a list": ([], 400, "give a JSON object"),
    "model": ({"model": "x"}, 404, "'tiny' is"),
    "unknown": ({"best_of": 2}, 400, "'best_of' is not known"),
    "tools": ({"tools": [{}]}, 400, "tools="),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty=0.5 is not supported"),
    "temperature": ({"temperature": 3}, 400, "from 0 to 2"),
    "top_p": ({"top_p": 0}, 400, "leaves no token"),
    "n": ({"n": True}, 400, "n=True"),
    "many": ({"n": 17}, 400, "from 1 to 16"),
    "length": ({"max_tokens": ROOM + 1}, 400, f"from 1 to {ROOM}"),
    "stop": ({"stop": [""]}, 400, "stop="),
    "stream options": ({"stream_options": {"include_usage": True}}, 400, "for stream=true"),
    "no messages": ({"messages": []}, 400, "give a list of messages"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
    "no content": ({"messages": [{"role": "user", "content": []}]}, 400, "messages[0].content"),
    "a URL": (
        {"messages": image("http://x/y.png")},
        400, "a URL is not fetched",
    ),
    "no image": (
        {"messages": image("data:image/png;base64,eHg=")},
        400, "cannot be read as an image",
    ),
    "a placeholder": ({"messages": messages(0, "<image>")}, 400, "image"),
    "too long": ({"messages": messages(0, "w1 " * 60)}, 400, "larger than all of the engine's buckets"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_answered_is_told(address, name):
    body, status, message = BAD[name]
    if isinstance(body, dict):
        body = GREEDY | {"messages": [{"role": "user", "content": "w1"}]} | body
    found = ask(address, body)
    assert found[0] == status, found
    assert message in found[1]["error"]["message"].replace('"', "'")
    assert set(found[1]["error"]) == {"message", "type", "param", "code"}
    if isinstance(body, dict) and "stream_options" not in body:
        assert ask(address, body | {"stream": True}) == found  # before the first byte of a stream


def test_limits_of_bodies_images_and_names(vlm, address):
    body = GREEDY | {"messages": messages(0)}
    assert ask(address, b" " * (2**20 + 1))[0] == 413
    assert ask(address, body, {"Content-Type": "text/plain"})[0] == 415
    assert ask(address, body, {"Host": "other.example"})[0] == 400
    assert ask(address, body, path="/other")[0] == 404
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    large = json.loads(json.dumps(body).replace(picture(0)[22:], base64.b64encode(bomb.getvalue()).decode()))
    assert "more than 50 million pixels" in ask(address, large)[1]["error"]["message"]
    many = [{"role": "user", "content": 17 * messages(0)[0]["content"][:1]}]
    assert "more than 16 images" in ask(address, body | {"messages": many})[1]["error"]["message"]


def test_a_client_that_leaves_frees_its_row(engine, client):
    before = engine.stats().cancelled
    stream = client.chat.completions.create(messages=messages(2), stream=True, model="tiny", n=16, temperature=2)
    next(iter(stream))
    stream.close()
    wait_until(lambda: engine.stats().cancelled > before and not engine.stats().rows_in_flight)
    assert client.chat.completions.create(messages=messages(0), **GREEDY).choices


def test_a_key_a_full_queue_and_a_time_limit(vlm, engine):
    limits = Limits(requests=2)
    with served(vlm, engine, key="secret", limits=limits) as (address, _):
        body, key = GREEDY | {"messages": messages(0)}, {"Authorization": "Bearer secret"}
        assert ask(address, body)[0] == 401
        assert ask(address, body, {"Authorization": "Bearer secre"})[1]["error"]["code"] == "invalid_api_key"
        assert ask(address, body, key)[0] == 200
        long = body | {"temperature": 2, "n": 16}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: ask(address, long, key)[0], range(8)))
        assert set(found) == {200, 429}
        with openai.OpenAI(base_url=address, api_key="secret", max_retries=9) as client:  # comes back as it is told
            assert client.chat.completions.create(**body).choices
    with served(vlm, engine, limits=Limits(seconds=0.0)) as (address, _):
        before = engine.stats().cancelled
        status, reply = ask(address, body | {"temperature": 2, "n": 16})
        assert (status, reply["error"]["code"]) == (504, "timeout")
        wait_until(lambda: engine.stats().cancelled > before)


def test_closing_ends_what_is_being_answered(vlm, engine):
    with served(vlm, engine) as (address, server), openai.OpenAI(base_url=address, api_key="x") as client:
        stream = iter(client.chat.completions.create(messages=messages(3), stream=True, **GREEDY))
        text = next(stream).choices[0].delta.content
        server.should_exit = True
        text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == vlm.processor.decode(expected(vlm, 3)[1])[0]


def check_many(vlm, engine, number):
    """Each client gets the answer to its own picture."""
    with served(vlm, engine, limits=Limits(requests=number)) as (address, _):
        texts = {seed: vlm.processor.decode(expected(vlm, seed)[1])[0] for seed in range(8)}
        with concurrent.futures.ThreadPoolExecutor(number) as pool:
            bodies = [GREEDY | {"messages": messages(i % 8), "n": 1 + i % 2} for i in range(number)]
            found = list(pool.map(lambda body: ask(address, body), bodies))
    assert len(set(texts.values())) > 4
    for i, (status, reply) in enumerate(found):
        assert status == 200, reply
        assert [choice["message"]["content"] for choice in reply["choices"]] == (1 + i % 2) * [texts[i % 8]]


def test_clients_at_the_same_time(vlm, engine):
    check_many(vlm, engine, 20)


@pytest.mark.thorough
def test_two_hundred_clients_at_the_same_time(vlm, engine):
    check_many(vlm, engine, 200)


def mutated(rng):
    """A body that something is wrong with, as bytes."""
    body = {"model": "tiny", "max_tokens": 2, "temperature": 0.0, "messages": messages(int(rng.integers(4)))}
    values = [None, True, -1, 1e300, "x", "\x00\ud800", [], {}, [[]], [None], {"a": {}}, "<image>", 2**70, ["x"] * 99]

    def change(value, depth=0):
        if rng.random() < 0.15:
            return values[rng.integers(len(values))]
        if isinstance(value, dict):
            found = {key: change(item, depth + 1) for key, item in value.items() if rng.random() < 0.95}
            return found | ({"extra": 1} if rng.random() < 0.05 else {})
        if isinstance(value, list):
            return [change(item, depth + 1) for item in value] * int(rng.integers(1, 3))
        if isinstance(value, str) and rng.random() < 0.2:
            cut = int(rng.integers(len(value) + 1))
            return value[:cut] + "".join(map(chr, rng.integers(1, 0x2FF, 3))) + value[cut:]
        return value

    text = json.dumps(change(body)).encode()
    for _ in range(rng.integers(3) if rng.random() < 0.3 else 0):
        place = int(rng.integers(len(text) + 1))
        text = text[:place] + bytes(rng.integers(0, 256, 2, dtype=np.uint8)) + text[place + int(rng.integers(3)) :]
    return text


def check_malformed(address, number, seed):
    rng = np.random.default_rng(seed)
    statuses = [ask(address, mutated(rng))[0] for _ in range(number)]
    assert set(statuses) <= {200, 400, 404}
    assert statuses.count(400) > number // 2


def test_malformed_bodies(address):
    check_malformed(address, 60, 0)


@pytest.mark.thorough
def test_a_thousand_malformed_bodies_leave_nothing_behind(address):
    check_malformed(address, 300, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_malformed(address, 1000, 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB


def test_usual_sizes(vlm):
    assert usual_sizes(vlm.processor, 1024, 4, (640, 480), 100) == [(128, 0), (128, 1), (192, 2), (192, 4)]
    with pytest.raises(vlc.InputError, match="smaller --image-size"):
        usual_sizes(vlm.processor, 16, 1, (640, 480), 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bucket", "2048"], "is not of the form TOKENS:TILES"),
        (["--image-size", "1024"], "is not of the form WIDTHxHEIGHT"),
        (["--host", "256.1.1.1"], "cannot be listened on"),
        (["--policy", "nothing"], "nothing"),
        (["--model", "none"], "none"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    assert main(["serve", "--model", str(tmp_path), "--port", "0", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.thorough
def test_the_command_ends_an_answer_on_sigterm_and_exits(tmp_path):
    make_tiny_llava(tmp_path / "tiny")
    command = [sys.executable, "-m", "vlcache_jax", "serve", "--model", tmp_path / "tiny", "--port", 0, "--rows", 2]
    command += ["--max-new-tokens", ROOM, "--images", 1, "--text-tokens", 20, "--no-compilation-cache"]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stderr if line.startswith("serving"))
        address = line.split()[3]
        assert line.startswith("serving tiny at http://127.0.0.1:")
        with openai.OpenAI(base_url=address, api_key="x") as client:
            stream = iter(client.chat.completions.create(messages=messages(0), stream=True, **GREEDY))
            next(stream)
            process.terminate()
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
        assert process.wait(30) == 143
        assert "Traceback" not in process.stderr.read()
