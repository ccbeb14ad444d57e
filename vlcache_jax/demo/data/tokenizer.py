"""The demo's word-level tokenizer and prompt format, in the files Hugging Face checkpoints carry."""

import re
import string

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vlcache_jax.demo.data import words

UNKNOWN, BOS, EOS, PAD, IMAGE = SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- message.role.upper() + ':' -}}
{%- if message.content is string -%}
{{- ' ' + message.content -}}
{%- else -%}
{%- for part in message.content if part.type == 'image' %} <image>{% endfor -%}
{%- for part in message.content if part.type == 'text' %}{{ '\\n' + part.text }}{% endfor -%}
{%- endif -%}
{{- ' ' if message.role == 'user' else '</s>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}
"""

# Words that never occur in training questions but that a user may well type; they start as good as unknown.
_EXTRA = ("a", "an", "are", "can", "do", "does", "hello", "my", "thank", "who", "your")

_PIECES = re.compile(r"\d|[^\W\d]+|[^\w\s]")


def prompt(question: str, images: int = 1) -> str:
    """The text a question about some images is asked with; equal to what `CHAT_TEMPLATE` renders."""
    return "USER:" + " <image>" * images + "\n" + question + " ASSISTANT:"


def _vocabulary() -> list[str]:
    texts = [
        *words.DOCUMENT_QUESTIONS,
        *words.PLACE_QUESTIONS,
        *words.PRICE_QUESTIONS,
        *words.SCENE_QUESTIONS,
        *words.COUNT_QUESTIONS,
        *words.NAMES,
        *words.ITEMS,
        *words.COLOURS,
        *words.SHAPES,
        *(words.plural(shape) for shape in words.SHAPES),
        *_EXTRA,
        "user: assistant: + = . , ? !",
    ]
    pieces = {piece for text in texts for piece in _PIECES.findall(re.sub(r"\{\d\}", " ", text).lower())}
    return [*SPECIAL_TOKENS, *sorted(pieces | set(string.digits))]


def build_tokenizer() -> Tokenizer:
    """A tokenizer of lower-case words, single digits and punctuation; decoding joins digits and punctuation again."""
    vocabulary = {token: i for i, token in enumerate(_vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    # WordPiece joins with spaces and takes them away again before punctuation; the rest puts numbers together.
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Fuse(), decoders.Replace(Regex(r"(?<=\d) (?=\d)"), "")]
    )
    return tokenizer
