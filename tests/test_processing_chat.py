"""Chat templates render as in transformers, in a sandbox."""

import json

import numpy as np
import pytest
from processing_checkpoint import TEMPLATE, edit_json, picture, write_checkpoint
from test_processing_parity import expected_tiles
from transformers import LlavaProcessor

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.models.processor import Processor
from vlcache_jax.models.text.chat_template import ChatTemplate

# llava-hf/llava-1.5-7b-hf's: images first, and a content that is plain text is dropped.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.content is string %}{% set parts = [{'type': 'text', 'text': message.content}] %}
    {%- else %}{% set parts = message.content %}{% endif %}
    {{- '[INST] ' if message['role'] == 'user' else '' }}
    {%- for part in parts %}
        {%- if part.type == 'image' %}{{- '<image>\n' }}{% continue %}{% endif %}
        {{- part.text }}
    {%- endfor %}
    {{- ' [/INST]' if message['role'] == 'user' else eos_token }}
{%- endfor %}
"""
ODDITIES = """
    {% set space = namespace(count=0) %}
    {% for message in messages %}
        {% set space.count = space.count + 1 %}
        {{ message | tojson }} {{ message | tojson(indent=2) }}
        {% for part in message['content'] %}
            {% if part['type'] == 'image' %}<image>{{ 'image' in part }}{{ 'path' in part }}{% break %}{% endif %}
        {% endfor %}
    {% endfor %}
    {{ space.count }} {{ tools }} {{ documents }} {{ strftime_now('%Y') }} {{ bos_token }}{{ pad_token }} {{ missing }}
    {% generation %}{% set inside = 1 %}<{{ inside }}>{% endgeneration %}{{ inside }}
"""


def conversation(*images, question="What is it?"):
    parts = [{"type": "image", "image": image} for image in images]
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": 'Where? <é> & "dogs"  '}]},
    ]


@pytest.mark.parametrize("tokenizer", ["words", "bytes", "llama"])
@pytest.mark.parametrize("template", [TEMPLATE, LLAVA, MISTRAL], ids=["simple", "llava", "mistral"])
def test_equals_transformers(tmp_path, template, tokenizer):
    theirs = write_checkpoint(tmp_path, tokenizer=tokenizer, template=template)
    ours = Processor.from_folder(tmp_path)
    first, second, third = (picture(40 + 9 * i, 30, i) for i in range(3))
    conversations = [conversation(first), conversation(second, third), conversation(question="Hi")]
    batch = ours.chat(conversations)
    for row, messages in enumerate(conversations):
        text = theirs.apply_chat_template(messages, add_generation_prompt=True)
        images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
        adds = not text.startswith("<s>")  # which transformers looks at when it tokenises
        expected = theirs(images=images or None, text=[text], add_special_tokens=adds)["input_ids"][0]
        assert batch.tokens[row, : batch.lengths[row]].tolist() == expected
        if images:
            np.testing.assert_array_equal(batch.pixels[row, : len(images)], expected_tiles(theirs, images))
    one = ours.chat(conversations[0])
    assert one.size == 1
    assert one.tokens[0, : one.lengths[0]].tolist() == batch.tokens[0, : batch.lengths[0]].tolist()
    direct = theirs.apply_chat_template(conversations[0], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert one.tokens[0, : one.lengths[0]].tolist() == direct["input_ids"][0]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", [TEMPLATE, LLAVA, MISTRAL, ODDITIES], ids=["simple", "llava", "mistral", "odd"])
def test_rendering(tmp_path, template, add_generation_prompt):
    theirs = write_checkpoint(tmp_path, template=template)
    special = Processor.from_folder(tmp_path).tokenizer.special_tokens
    bare = [dict(message) for message in conversation()]
    bare[0]["content"] = [{"type": "image", "image": "image"}, *bare[0]["content"]]
    ours = ChatTemplate(template, special).render(bare, add_generation_prompt)
    assert ours == theirs.apply_chat_template(bare, add_generation_prompt=add_generation_prompt)


def test_a_plain_text_is_never_dropped(tmp_path):
    """LLaVA-1.5's template renders a content that is a str as nothing; here it counts as one text part."""
    write_checkpoint(tmp_path, tokenizer="bytes", template=LLAVA)
    ours = Processor.from_folder(tmp_path)
    plain = ours.chat([{"role": "user", "content": "How many objects?"}])
    parts = ours.chat([{"role": "user", "content": [{"type": "text", "text": "How many objects?"}]}])
    np.testing.assert_array_equal(plain.tokens, parts.tokens)
    assert "How many objects?" in ours.decode(plain.tokens)[0]


def test_a_text_that_the_template_handles_is_rendered_as_it_is(tmp_path):
    theirs = write_checkpoint(tmp_path, template=MISTRAL)
    messages = [{"role": "user", "content": "How many objects?", "name": None}]
    ours = Processor.from_folder(tmp_path).chat(messages)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert ours.tokens[0, : ours.lengths[0]].tolist() == expected["input_ids"][0]


def test_where_templates_are_found(tmp_path):
    """Which of several counts is transformers' choice; tokenizer_config.json comes last."""
    write_checkpoint(tmp_path, template=None)
    assert not Processor.from_folder(tmp_path).has_chat_template
    with pytest.raises(CheckpointError, match="no chat template"):
        Processor.from_folder(tmp_path).chat([{"role": "user", "content": "hi"}])

    def rendered(processor):
        return processor.chat([{"role": "user", "content": "hi"}]).tokens[0, 1]

    def words(word):
        return Processor.from_folder(tmp_path).tokenizer.encode(word)[1]

    templates = [{"name": "other", "template": "x"}, {"name": "default", "template": "What hi"}]
    edit_json(tmp_path / "tokenizer_config.json", chat_template=templates)
    assert rendered(Processor.from_folder(tmp_path)) == words("What")
    edit_json(tmp_path / "tokenizer_config.json", chat_template="many hi")
    assert rendered(Processor.from_folder(tmp_path)) == words("many")
    (tmp_path / "chat_template.jinja").write_text("picture hi")
    assert rendered(Processor.from_folder(tmp_path)) == words("picture")
    assert LlavaProcessor.from_pretrained(tmp_path).chat_template == "picture hi"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "dogs hi"}))
    assert rendered(Processor.from_folder(tmp_path)) == words("dogs")
    assert LlavaProcessor.from_pretrained(tmp_path).chat_template == "dogs hi"
    edit_json(tmp_path / "processor_config.json", chat_template="cat hi")
    assert rendered(Processor.from_folder(tmp_path)) == words("cat")
    assert LlavaProcessor.from_pretrained(tmp_path).chat_template == "cat hi"


def test_image_paths(tmp_path):
    write_checkpoint(tmp_path)
    ours = Processor.from_folder(tmp_path)
    path = tmp_path / "x.png"
    picture(30, 40).save(path)
    by_path = [[{"role": "user", "content": [{"type": "image", "path": path}]}]]
    by_image = [[{"role": "user", "content": [{"type": "image", "image": str(path)}]}]]
    np.testing.assert_array_equal(ours.chat(by_path).pixels, ours.chat(by_image).pixels)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'] }}",
        "{% set x = messages.append(1) %}{{ messages }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{% include 'config.json' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ range(99999999) | list }}",
        "{{ 1 // 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ missing.attribute }}",
        "{{ messages | unknown_argument(1) if false else 1 + 'a' }}",
    ],
)
def test_hostile_and_failing_templates(tmp_path, template):
    write_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match="chat template"):
        Processor.from_folder(tmp_path).chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "template", ["{% for x in y %}", "{{ }", "{% if %}", "{{ 'a' | nofilter }}", "{% nosuchtag %}"]
)
def test_templates_that_do_not_parse(tmp_path, template):
    write_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match="does not parse"):
        Processor.from_folder(tmp_path)


def test_a_template_never_sees_the_image(tmp_path):
    write_checkpoint(tmp_path, template="{{ messages[0].content[0].image.save('stolen.png') }}")
    image = picture(9, 9)
    with pytest.raises(CheckpointError, match="fails on this conversation"):
        Processor.from_folder(tmp_path).chat([{"role": "user", "content": [{"type": "image", "image": image}]}])


def test_a_refused_conversation(tmp_path):
    write_checkpoint(tmp_path, template=MISTRAL)
    with pytest.raises(InputError, match="roles must alternate"):
        Processor.from_folder(tmp_path).chat([{"role": "assistant", "content": "hi"}])


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ("hello", "list of conversations"),
        ([], "list of conversations"),
        ([[]], "row 0 is not a list of messages"),
        ([[{"role": "user", "content": "a"}], "b"], "row 1 is not a list"),
        ([["hello"]], "row 0, message 0 is not a message"),
        ([{"content": "hello"}], "row 0, message 0 is not a message"),
        ([{"role": "user", "content": 5}], "content of type int"),
        ([{"role": "user", "content": [5]}], "part 0 is neither"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "'video' is not supported"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part 0 is neither"),
        ([{"role": "user", "content": [{"type": "image"}]}], "give .'type': 'image'"),
        ([{"role": "user", "content": [{"type": "image", "image": 5}]}], "give .'type': 'image'"),
        ([{"role": "user", "content": [{"type": "image", "image": "a", "path": "b"}]}], "give .'type': 'image'"),
        ([{"role": "user", "content": [{"type": "image", "url": "https://x/y.png"}]}], "URL is not fetched"),
        ([{"role": "user", "content": [{"type": "image", "image": "https://x/y.png"}]}], "is a URL"),
        ([{"role": "user", "content": "look: <image>"}], "row 0: the prompt holds 1 image tokens"),
        ([{"role": "user", "content": "hi", "tool": object()}], "not plain"),
    ],
)
def test_bad_conversations(tmp_path, conversations, message):
    write_checkpoint(tmp_path)
    with pytest.raises(InputError, match=message):
        Processor.from_folder(tmp_path).chat(conversations)
