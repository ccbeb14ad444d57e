"""The tokens of the Penn Treebank, which caption scores are defined on."""

import re

_ABBREVIATION = r"(?:[a-z]\.){2,}|(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|inc|co|corp|ltd|no|u\.s)\.(?=\s|$)"
_CLITIC = r"(?i:n['’]t|['’](?:s|re|ve|ll|d|m))"
_TOKEN = re.compile(
    rf"(?P<abbreviation>\b(?i:{_ABBREVIATION}))"
    r"|(?P<number>[+-]?\d+(?:[.,:/]\d+)*)"
    rf"|(?P<clitic>{_CLITIC}\b)"
    rf"|(?P<word>[^\W\d_](?:(?!{_CLITIC}\b)[\w]|[-&](?=\w))*)"
    r"|(?P<dots>\.{2,}|-{2,}|``|'')"
    r"|(?P<sign>\S)",
)
_PARTS = {
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
}
_PUNCTUATION = {
    *("''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"),
    *("(", ")", "[", "]", "{", "}"),
}


def ptb_tokens(text: str) -> list[str]:
    """Words as caption scores count them: Penn Treebank tokens in lower case, without punctuation.

    Clitics are tokens of their own (`do n't`, `dog 's`), hyphenated words, numbers and abbreviations are one, and
    currency and per cent signs stand alone. Written from the treebank's rules for English; rare abbreviations are cut
    at their full stop, which does not count.

    Example:
      >>> ptb_tokens("A man's dog doesn't eat 1,234.5 well-known (red) apples.")
      ['a', 'man', "'s", 'dog', 'does', "n't", 'eat', '1,234.5', 'well-known', 'red', 'apples']
    """
    tokens: list[str] = []
    for match in _TOKEN.finditer(text):
        token = match.group().lower().replace("’", "'")
        if token in _PUNCTUATION or set(token) <= {"."} or set(token) <= {"-"}:
            continue
        tokens.extend(_PARTS.get(token, (token,)))
    return tokens
