"""The tokens of the Penn Treebank, which caption scores are defined on."""

import re

_CLITIC = r"(?i:n['’]t|['’](?:s|re|ve|ll|d|m))(?!\w)"
_PLAIN = rf"(?:(?!{_CLITIC})[^\W_])+"
_TITLES = (
    r"(?:messrs|mrs?|ms|drs?|profs?|sens?|reps?|attys?|lt|col|gen|govs?|adm|rev|maj|sgt|cpl|pvt|mt|capt|ste?|ave|pres"
    r"|lieut|hon|jr|sr|bros|vs|etc|inc|cos?|corp|ltd|plc|univ|assn|jan|feb|aug|sept?|oct|nov|dec|e\.g|i\.e|a\.k\.a"
    r"|(?:ph|ed)\.d|no(?=\.(?:\s*\d|[:,]))|[a-z](?=\.(?:\s*$|\.\.)))\."
)
_OF_MAIL = r"[^\s\"<>|().{}]+"
_KINDS = {
    "markup": r"</?[A-Za-z][^<>\s]*/?>",
    "address": r"https?://[^\s\"<>()]+[^\s\"<>().,!?]|www\.(?:[^\W_]+\.)+[a-z]{2,4}(?!\w)",
    "mail": rf"{_OF_MAIL}@(?:{_OF_MAIL}\.)*{_OF_MAIL}",
    "tag": r"#[^\W\d_]\w*",
    "abbreviation": rf"(?<![\w'’])(?i:{_TITLES}|(?:[a-z]\.)+(?:[a-z]\.)(?!\w))",
    "date": r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}(?!\w)",
    "fraction": r"\d{1,4}/\d{1,4}(?!\w)",
    "either": rf"{_PLAIN}(?:-[A-Za-z]+){{0,2}}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}){{1,2}}(?!\w)",
    "number": r"(?:(?<![\w])[+-])?(?:\d+(?:[.:,]\d+)+|(?<!\w)(?:[.:,]\d+)+)(?![^\W\d_])",
    "decade": r"['’]\d0s(?!\w)",
    "initials": r"[A-Z]+(?:[+&][A-Z]+)+(?!\w)|(?i:c)\+\+",
    "and": r"['’][nN]['’]",
    "all": r"[yY]['’](?=[aA]ll)",
    "elided": r"[^\W\d_]*[aeiouyAEIOUY]['’](?:[aeiouA-Z])[^\W\d_]+|[dDoOlL]['’](?!ll\b)[^\W\d_]{2,}",
    "word": rf"(?:(?<!\w)[+-](?=\d))?{_PLAIN}(?:[-_]{_PLAIN})*",
    "clitic": _CLITIC,
    "marks": r"[?!]+|\.{2,}|-{2,}|``|''",
    "sign": r"\S",
}
_TOKEN = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _KINDS.items()))
_PARTS = {
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
}
_SIGNS = str.maketrans({
    **dict.fromkeys("“”„«»", '"'), "–": " -- ", "—": " -- ", "…": " ... ", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ",
    "£": "#", "€": "$", "¢": " cents ", "‘": "`",
})  # fmt: skip
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PUNCTUATION = {*("''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"), "’"}


def ptb_tokens(text: str) -> list[str]:
    """Words as caption scores count them: Penn Treebank tokens in lower case, without punctuation.

    Clitics are tokens of their own (`do n't`, `dog 's`), hyphenated words, numbers and abbreviations are one, currency
    and per cent signs stand alone, and brackets count, as they do in the scores of COCO captions.

    Example:
      >>> ptb_tokens("A man's dog doesn't eat 1,234.5 well-known (red) apples.")
      ['a', 'man', "'s", 'dog', 'does', "n't", 'eat', '1,234.5', 'well-known', '-lrb-', 'red', '-rrb-', 'apples']
    """
    tokens: list[str] = []
    for match in _TOKEN.finditer(text.translate(_SIGNS)):
        token = match.group().lower().replace("’", "'")
        token = _BRACKETS.get(token, token)
        if token not in _PUNCTUATION and not set(token) <= {"."} and not set(token) <= {"-"}:
            tokens.extend(_PARTS.get(token, (token,)))
    return tokens
