"""Chat: named templates, contents in the form that a template takes, images beside messages and inside data URLs."""

import base64
import contextlib
import io
import json

import numpy as np
import pytest
from processing_checkpoint import TEMPLATE, picture, write_checkpoint
from transformers import AutoProcessor, LlavaProcessor

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.models.io.files import checkpoint_folder
from vlcache_jax.models.processor import Processor
from vlcache_jax.models.text.chat_template import ChatTemplate, read_templates

TEXTS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
ADDED = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
FILTERED = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim | upper }}\n{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m.role }}] {% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}"
    "{{ p.text }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)
ONLY_TEXT_PARTS = "{% for m in messages %}[{{ m.role }}] {{ m.content[0]['text'] }}\n{% endfor %}"
SYSTEM_TEXT = (
    "{% for m in messages %}[{{ m.role }}] {% if m.role == 'system' %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m.content is not string %}{{ raise_exception('texts only') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)

# transformers leaves the files of named templates open.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

IMAGE, TEXT = {"type": "image", "image": "image"}, {"type": "text", "text": "What is it?"}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [IMAGE, TEXT]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": "Where?"},
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEXTS, "[system] Be brief.\n[user] <image>\nWhat is it?\n[assistant] A cat.\n[user] Where?\n"),
        (ADDED, "[system] Be brief.\n[user] <image>\nWhat is it?\n[assistant] A cat.\n[user] Where?\n"),
        (STRICT, "[system] Be brief.\n[user] <image>\nWhat is it?\n[assistant] A cat.\n[user] Where?\n"),
        (FILTERED, "[system] BE BRIEF.\n[user] <IMAGE>\nWHAT IS IT?\n[assistant] A CAT.\n[user] WHERE?\n"),
        (PARTS, "[system] Be brief.\n[user] <image>What is it?\n[assistant] A cat.\n[user] Where?\n"),
        (ONLY_TEXT_PARTS, "[system] Be brief.\n[user] <image>\nWhat is it?\n[assistant] A cat.\n[user] Where?\n"),
        (SYSTEM_TEXT, "[system] Be brief.\n[user] <image>What is it?\n[assistant] A cat.\n[user] Where?\n"),
    ],
    ids=["texts", "added", "strict", "filtered", "parts", "text parts", "system text"],
)
def test_contents_are_given_in_the_form_that_the_template_takes(template, expected):
    assert ChatTemplate(template).render(CONVERSATION) == expected


def test_images_stay_where_they_are_between_texts():
    content = [TEXT, IMAGE, {"type": "text", "text": "And"}, IMAGE]
    prompt = ChatTemplate(TEXTS).render([{"role": "user", "content": content}])
    assert prompt == "[user] What is it?\n<image>\nAnd\n<image>\n"


def test_the_form_depends_on_the_template_not_on_the_text():
    """A template may leave part of a text out on purpose; the rest is not rendered in another way for that."""
    template = ChatTemplate("{% for m in messages %}{{ m.content.split('</think>')[-1] }};{% endfor %}")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>So</think>Yes"}]
    assert template.render(messages) == "Hi;Yes;"


@pytest.mark.parametrize("template", [TEXTS, PARTS, ONLY_TEXT_PARTS], ids=["texts", "parts", "text parts"])
def test_a_template_of_any_form_gives_an_image_its_place(tmp_path, template):
    write_checkpoint(tmp_path, tokenizer="bytes", template=template)
    ours = Processor.from_folder(tmp_path)
    images = [picture(30, 20, 1), picture(20, 30, 2)]
    parts = [{"type": "image", "image": images[0]}, {"type": "image", "image": images[1]}, TEXT]
    batch = ours.chat([{"role": "user", "content": parts}])
    expected = ours(images=[images], text=["<image><image>"])
    np.testing.assert_array_equal(batch.pixels, expected.pixels)
    assert "What is it?" in ours.decode(batch.tokens)[0]


def words(processor, batch):
    return processor.tokenizer.decode(batch.tokens[0, : batch.lengths[0]]).split()


def test_named_templates_as_transformers_reads_them(tmp_path):
    theirs = write_checkpoint(
        tmp_path, tokenizer="bytes", template={"default": "default", "tool_use": "tool", "x": "x"}
    )
    assert {path.name for path in (tmp_path / "additional_chat_templates").iterdir()} == {"tool_use.jinja", "x.jinja"}
    ours = Processor.from_folder(tmp_path)
    assert set(ours.chat_templates) == set(theirs.chat_template) == {"default", "tool_use", "x"}
    messages = [{"role": "user", "content": "Hi"}]
    for name in theirs.chat_template:
        expected = theirs.apply_chat_template(messages, chat_template=name)
        assert words(ours, ours.chat(messages, template=name)) == [expected]
    assert words(ours, ours.chat(messages)) == ["default"]
    with pytest.raises(InputError, match=r"no chat template 'rag': choose one of .*'tool_use'"):
        ours.chat(messages, template="rag")
    for wrong in (None, ["x"], 5):
        with pytest.raises(InputError, match="no chat template"):
            ours.chat(messages, template=wrong)
    # Without a default, one must be named, as in transformers.
    (tmp_path / "chat_template.jinja").unlink()
    ours = Processor.from_folder(tmp_path)
    assert not ours.has_chat_template
    assert words(ours, ours.chat(messages, template="x")) == ["x"]
    with pytest.raises(InputError, match="no chat template 'default'"):
        ours.chat(messages)
    with pytest.raises(ValueError, match="none of them are named"):
        LlavaProcessor.from_pretrained(tmp_path).apply_chat_template(messages)
    # The legacy file is the default, too.
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    assert words(ours, Processor.from_folder(tmp_path).chat(messages)) == ["legacy"]


def test_names_inside_the_configuration(tmp_path):
    write_checkpoint(tmp_path, template=None)
    folder = checkpoint_folder(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_templates(folder) == {"default": "a", "rag": "b"}
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.chat_template == {"default": "a", "rag": "b"}
    for wrong in ([{"name": "default"}], {"default": 5}, [5], 5):
        settings["chat_template"] = wrong
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template"):
            read_templates(folder)


def test_additional_templates_may_not_be_links_out_of_the_folder(tmp_path):
    write_checkpoint(tmp_path / "a", template={"default": "default", "x": "x"})
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "a/additional_chat_templates/x.jinja").unlink()
    (tmp_path / "a/additional_chat_templates/x.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside the checkpoint folder"):
        Processor.from_folder(tmp_path / "a")
    (tmp_path / "a/additional_chat_templates/x.jinja").unlink()
    (tmp_path / "a/additional_chat_templates").rmdir()
    (tmp_path / "a/additional_chat_templates").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="is a link"):
        Processor.from_folder(tmp_path / "a")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_checkpoint(folder, tokenizer="bytes", template=TEMPLATE)
    return Processor.from_folder(folder)


def test_images_beside_the_messages(processor):
    first, second = picture(30, 20, 1), picture(20, 30, 2)
    bare = {"type": "image"}
    inside = [[{"role": "user", "content": [{"type": "image", "image": i}, TEXT]} for i in (first, second)]]
    expected = processor.chat(inside)
    beside = [[{"role": "user", "content": [bare, TEXT]}] * 2]
    mixed = [[inside[0][0], beside[0][1]]]
    tokens = [[{"role": "user", "content": "<image>\nWhat is it?"}] * 2]
    for conversations, images in [
        (beside, [[first, second]]),
        (beside[0], [first, second]),
        (mixed, [[second]]),
        (tokens, [[first, second]]),
    ]:
        batch = processor.chat(conversations, images=images)
        np.testing.assert_array_equal(batch.tokens, expected.tokens)
        np.testing.assert_array_equal(batch.pixels, expected.pixels)
    two_rows = processor.chat([beside[0][:1], [{"role": "user", "content": "Hi"}]], images=[first, None])
    np.testing.assert_array_equal(two_rows.pixels[0], expected.pixels[0, :1])


@pytest.mark.parametrize(
    ("content", "images", "message"),
    [
        ([{"type": "image"}, TEXT], None, "row 0 has 1 parts .* without an image, and 0 images .* give"),
        ([{"type": "image"}, TEXT], [[]], "row 0 has 1 parts .* and 0 images"),
        ([{"type": "image"}, TEXT], [[picture(9, 9), picture(9, 9)]], "row 0 has 1 parts .* and 2 images"),
        ([IMAGE | {"image": picture(9, 9)}, TEXT], [[picture(9, 9)]], "row 0 has 0 parts .* and 1 images"),
        ("no place", [[picture(9, 9)]], "the prompt holds 0 image tokens .* but 1 images"),
        ("<image><image>", [[picture(9, 9)]], "the prompt holds 2 image tokens .* but 1 images"),
        ([{"type": "image"}, TEXT], [[picture(9, 9)], []], "images has 2 entries"),
        ([{"type": "image"}, TEXT], [[None]], "row 0, image 0 is a builtins.NoneType"),
    ],
)
def test_images_without_a_place_and_places_without_an_image(processor, content, images, message):
    with pytest.raises(InputError, match=message):
        processor.chat([[{"role": "user", "content": content}]], images=images)


def data_url(image, kind="PNG", head="data:image/png;base64,"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return head + base64.b64encode(stream.getvalue()).decode()


def test_data_urls(processor):
    image = picture(30, 20, 1)
    url = data_url(image)
    expected = processor.chat([{"role": "user", "content": [{"type": "image", "image": image}, TEXT]}])
    for part in [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "image": url},
        {"type": "image", "url": url},
        {"type": "image", "base64": url.partition(",")[2]},
        {"type": "image", "image": url.replace("+", "%2B").replace("/", "%2F").replace("image%2Fpng", "image/png")},
        {"type": "image", "image": data_url(image, "PNG", "DATA:image/PNG;charset=x;BASE64,\n")},
        {"type": "image", "image": data_url(image, "BMP", "data:image/jpeg;base64,")},  # the bytes tell the format
    ]:
        batch = processor.chat([{"role": "user", "content": [part, TEXT]}])
        np.testing.assert_array_equal(batch.tokens, expected.tokens)
        np.testing.assert_array_equal(batch.pixels, expected.pixels)
    np.testing.assert_array_equal(processor(images=[url], text=["<image>"]).pixels, expected.pixels)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "https://x/y.png"}}, "part 0 is a URL .*not fetched.*download"),
        ({"type": "image_url", "image_url": {"url": "http://x/y.png"}}, "is a URL"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "is a URL"),
        ({"type": "image_url", "image_url": {"url": "FILE:/etc/passwd"}}, "is a URL"),
        ({"type": "image_url", "image_url": {"url": "s3://x/y.png"}}, "is a URL"),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "without a URL"),
        ({"type": "image_url", "image_url": {}}, "without a URL"),
        ({"type": "image_url"}, "without a URL"),
        ({"type": "image", "url": "/etc/passwd"}, "is a URL"),
        ({"type": "image", "image": "file:///etc/passwd"}, "is a URL"),
        ({"type": "image_url", "image_url": {"url": "data:text/plain;base64,aGk="}}, "data URL 'data:text/plain"),
        ({"type": "image_url", "image_url": {"url": "data:image/png,aGk="}}, "expected data:image/png;base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64"}}, "expected data:image/png;base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,a"}}, "broken base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,?é"}}, "broken base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, "empty data URL"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}, "cannot be read as an image"),
        ({"type": "image", "base64": 5}, "keys"),
    ],
)
def test_other_urls_are_refused(processor, part, message):
    with pytest.raises(InputError, match=message):
        processor.chat([{"role": "user", "content": [part, TEXT]}])


def test_a_data_url_that_is_too_long(processor, monkeypatch):
    monkeypatch.setattr("vlcache_jax.models.images.data_url.DATA_URL_CHARACTERS", 100)
    with pytest.raises(InputError, match="the limit is 100"):
        processor.chat([{"role": "user", "content": [{"type": "image", "image": data_url(picture(30, 20))}, TEXT]}])


@pytest.mark.parametrize("key", ["image", "images"])
def test_images_that_no_template_would_see_are_refused(processor, key):
    with pytest.raises(InputError, match=rf"row 0, message 0 has its images under '{key}'"):
        processor.chat([{"role": "user", "content": "What is it?", key: ["cat.png"]}])


def test_messages_nested_deeply(processor):
    nested: list = []
    for _ in range(900):
        nested = [nested]
    with contextlib.suppress(CheckpointError, InputError):  # Python's own limit decides
        processor.chat([{"role": "user", "content": "Hi", "more": nested}])
    assert processor.chat([{"role": "user", "content": "Hi"}]).size == 1


def test_too_many_and_too_long_templates(tmp_path):
    write_checkpoint(tmp_path, template={"default": "default", "x": "x"})
    (tmp_path / "additional_chat_templates/x.jinja").write_text("x" * 4_000_001)
    with pytest.raises(CheckpointError, match=r"x\.jinja has 4000001 bytes"):
        Processor.from_folder(tmp_path)
    for number in range(101):
        (tmp_path / f"additional_chat_templates/{number}.jinja").write_text("x")
    with pytest.raises(CheckpointError, match="102 templates, the limit is 100"):
        Processor.from_folder(tmp_path)


def test_parts_hold_nothing_but_plain_values(processor):
    part = {"type": "text", "text": "Hi", "content": object()}
    with pytest.raises(InputError, match="row 0, message 0, part 0 holds something that is not plain"):
        processor.chat([{"role": "user", "content": [part]}])
