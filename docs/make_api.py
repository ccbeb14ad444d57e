"""Writes the API reference, docs/api/, from the docstrings: `python docs/make_api.py`.

It reads the source and imports nothing, so the pages are the same under every version of Python and JAX.
"""

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = Path(__file__).parent / "api"
COMMAND = "python docs/make_api.py"

# Page: its title, and what is on it, in order: names of vlcache_jax, or of a module of it ("metrics: ..."; * for all).
GROUPS = {
    "loading": ("Loading", ["load save VLM WeightCoding use_compilation_cache"]),
    "prompts": (
        "Prompts",
        [
            "models.processor: Processor",
            "models.text.text_stream: TextStream",
            "Batch Continuation Video FrameSampling",
        ],
    ),
    "generation": (
        "Generation",
        ["generate stream Generation Sampling Report prefill decode decode_step stream_decode KVState Kernels"],
    ),
    "contexts": (
        "Contexts",
        [
            "compress answer extend score Scores divergence Divergence Context save_context load_context",
            "empty_rows insert decode_chunk DecodingState RowOptions",
        ],
    ),
    "engine": ("Engine", ["Engine Request Result", "engine.stats: Stats", "evaluate", "evaluation.report: Summary"]),
    "policies": (
        "Policies",
        [
            "Recipe recipe_by_name",
            "Policy policy_by_name VLCache SnapKV PyramidKV AdaKV H2O TOVA StreamingLLM LookM PrefixKV ZipVL AirCache",
            "MixKV TGVKV CSP CriticalKV SparseMM KVzip Compactor LagKV",
            "ExpectedAttention KeyNorm KeyDifference RandomEviction RankedBits FullCache",
            "Tokens Window Bytes ByteShare Mass",
            "policies: method",
            "VisionZip TokenCorrelation DivPrune PiToMe ToDRE AIM CDPruner FastV PyramidDrop Feather SparseVLM",
            "KeepCurve search_keep_curve CoreMatching VFlowOpt",
            "layer_budgets PostVision LastRows Drop Merge Quantise Append RollingWindow Evict Recompress VAR VASparse",
        ],
    ),
    "sparse_prefill": (
        "Sparse prefill",
        [
            "XAttention FlexPrefill MInference MMInference AShape TriShape BlockMask",
            "patterns.pattern: Pattern PatternInputs Chosen Moved",
            "patterns.grammar: pattern_by_name",
            "inference.report: PrefillReport",
        ],
    ),
    "planning": ("Planning", ["planning: *"]),
    "training": ("Training", ["training: *"]),
    "metrics": ("Metrics", ["evaluation.metrics: *"]),
    "pictures": ("Pictures and progress", ["explain: explain kept_by_layer", "terminal.progress: Progress"]),
    "errors": (
        "Errors",
        ["VLCacheError CheckpointError NonFiniteError InputError PolicyError PolicyWarning PlacementWarning"],
    ),
}
_SECTIONS = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples|References):[ ]*$", re.MULTILINE)

Definition = ast.FunctionDef | ast.ClassDef


def pages() -> dict[str, str]:
    """The text of each page, by its file name."""
    public = exported("public")
    for node in _tree(_file("policies.budget")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            _CONSTANTS[ast.unparse(node.targets[0])] = ast.unparse(node.value)
    groups = {page: (title, [e for word in words for e in _entries(word)]) for page, (title, words) in GROUPS.items()}
    listed = {name for _, entries in groups.values() for _, name in entries}
    if rest := sorted(set(public) - listed):
        groups["more"] = ("More", [("public", name) for name in rest])
    made = f"Made from the docstrings by `{COMMAND}`"
    written, index = {}, ["# API reference", "", f"{made}. `vlc` is `vlcache_jax`; what lies elsewhere says where."]
    for page, (title, entries) in groups.items():
        parts = [f"# {title}", "", f"{made}; [all pages](README.md)."]
        for module, name in entries:
            parts.append(_entry(module, name))
        written[f"{page}.md"] = "\n".join(parts) + "\n"
        names = ", ".join(f"[`{name}`]({page}.md#{name.lower()})" for _, name in entries)
        lines = textwrap.wrap(names, 120, break_on_hyphens=False, break_long_words=False)
        index += ["", f"## [{title}]({page}.md)", "", *lines]
    written["README.md"] = "\n".join(index) + "\n"
    return written


def exported(module: str) -> list[str]:
    """The names in a module's `__all__`."""
    for node in _tree(_file(module)).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    raise LookupError(f"{module} has no __all__")


def _entries(word: str) -> list[tuple[str, str]]:
    module, colon, names = word.partition(": ")
    if not colon:
        module, names = "public", word
    return [(module, name) for name in (exported(module) if names == "*" else names.split())]


def _entry(module: str, name: str) -> str:
    node = _find(module, name)
    where = f"vlcache_jax.{module}.{name}" if module != "public" else f"vlc.{name}"
    parts = [f"\n## {name}\n", f"```python\n{_signature(where, node)}\n```\n", _text(ast.get_docstring(node) or "")]
    for method in node.body if isinstance(node, ast.ClassDef) else ():
        if not isinstance(method, ast.FunctionDef) or (method.name.startswith("_") and method.name != "__call__"):
            continue
        if text := ast.get_docstring(method):
            shown = "property " if any(getattr(d, "id", "") == "property" for d in method.decorator_list) else ""
            signature = f"{shown}{_signature(method.name, method)}"
            parts += [f"### {name}.{method.name}\n", f"```python\n{signature}\n```\n", _text(text)]
    return "\n".join(parts).rstrip()


def _signature(name: str, node: Definition) -> str:
    returns = ""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
        arguments = _arguments(node)
    else:
        record = node.decorator_list or "NamedTuple" in map(ast.unparse, node.bases)
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and record]
        arguments = [ast.unparse(part).replace("dataclasses.field", "field") for part in fields]
        arguments = [re.sub(r" = field\(metadata=.*\)$", "", argument) for argument in arguments]
        name = f"class {name}"
        if not fields:
            return f"{name}({', '.join(map(ast.unparse, node.bases))})" if node.bases else name
    line = f"{name}({', '.join(arguments)}){returns}"
    return line if len(line) <= 110 else "\n".join([f"{name}(", *(f"    {a}," for a in arguments), f"){returns}"])


def _arguments(node: ast.FunctionDef) -> list[str]:
    given = node.args
    defaults = [None] * (len(given.posonlyargs + given.args) - len(given.defaults)) + list(given.defaults)
    shown = [_argument(a, d) for a, d in zip(given.posonlyargs + given.args, defaults) if a.arg not in ("self", "cls")]
    if given.vararg or given.kwonlyargs:
        shown.append(f"*{ast.unparse(given.vararg)}" if given.vararg else "*")
    shown += [_argument(a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults)]
    return shown + ([f"**{ast.unparse(given.kwarg)}"] if given.kwarg else [])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if argument.annotation is not None else "="
    shown = "" if default is None else f"{equals}{_CONSTANTS.get(ast.unparse(default)) or ast.unparse(default)}"
    return ast.unparse(argument) + shown


def _text(docstring: str) -> str:
    """A docstring as Markdown."""
    first, *parts = _SECTIONS.split(inspect.cleandoc(docstring))
    blocks = [_code_apart(first.strip())]
    for title, body in zip(parts[::2], parts[1::2]):
        section, rest = _section_and_rest(body)
        if title.startswith("Example"):
            blocks.append(f"**{title}**\n\n```python\n{section}\n```")
        elif title in ("Returns", "Yields", "References"):
            blocks.append(f"**{title}** {_code_apart(section)}")
        else:
            blocks.append(f"**{title}**\n\n{_items(section)}")
        if rest:
            blocks.append(_code_apart(rest))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _section_and_rest(body: str) -> tuple[str, str]:
    """The indented lines, without their indentation, and what follows them."""
    lines = body.strip("\n").split("\n")
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    return textwrap.dedent("\n".join(lines[:end])).strip(), "\n".join(lines[end:]).strip()


def _items(section: str) -> str:
    """`name: text` entries, with indented further lines, as a list."""
    items = re.split(r"\n(?=\S)", section)
    shown = []
    for item in items:
        name, colon, text = item.partition(":")
        named = colon and re.fullmatch(r"[*\w., ]+", name)
        shown.append(" ".join((f"* `{name}`: {text}" if named else f"* {item}").split()))
    return "\n".join(shown)


def _code_apart(text: str) -> str:
    """Indented lines are code in Markdown only after an empty line."""
    return re.sub(r"(\n\S[^\n]*)\n(?=    )", r"\1\n\n", text)


def _file(module: str) -> Path:
    own = module.split(".")[0] in ("models", "kernels")  # at the top of the repository
    folder = (ROOT if own else ROOT / "vlcache_jax") / module.replace(".", "/")
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


_TREES: dict[Path, ast.Module] = {}
_CONSTANTS: dict[str, str] = {}
"""Defaults that have a name."""


def _tree(path: Path) -> ast.Module:
    if path not in _TREES:
        _TREES[path] = ast.parse(path.read_text(encoding="utf-8"))
    return _TREES[path]


def _find(module: str, name: str) -> Definition:
    """Where a name of a module is defined, through whatever imports it."""
    for node in ast.walk(_tree(_file(module))):
        if isinstance(node, Definition) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            assert node.module is not None
            return _find(node.module.removeprefix("vlcache_jax").lstrip("."), name)
    raise LookupError(f"{module} has no {name}")


def main() -> None:
    """Writes the pages, and removes those that are no more."""
    PAGES.mkdir(exist_ok=True)
    written = pages()
    for path in PAGES.glob("*.md"):
        if path.name not in written:
            path.unlink()
    for name, text in written.items():
        (PAGES / name).write_text(text, encoding="utf-8")
    print(f"{len(written)} pages in {PAGES}", file=sys.stderr)


if __name__ == "__main__":
    main()
