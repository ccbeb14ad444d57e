"""The arguments. Nothing heavy is imported here, so that help and argument errors come at once."""

import argparse
import sys
from importlib import import_module
from typing import Any, NoReturn

from vlcache_jax.cli.process import BAD_INPUT, PROGRAM, SIGNALS, complain, emit
from vlcache_jax.terminal import words
from vlcache_jax.terminal.progress import Progress

MAX_NEW_TOKENS = 64
POLICY = "NAME[:BUDGET][,OPTION=VALUE]..."


class _Parser(argparse.ArgumentParser):
    """Errors look like all others of the program: one line."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        raise SystemExit(BAD_INPUT)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's own, which fails on an option's value `--` (bpo-14364)."""
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            if word == "--" or (word.startswith("--") and word.endswith("=--")):
                self.error(f"{word!r} has no meaning here: leave it out")
        return super().parse_known_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        """As argparse's own, which hides that it could not be written."""
        emit(self.format_help(), end="")


class _Version(argparse.Action):
    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        from vlcache_jax import __version__

        emit(f"{PROGRAM} {__version__}")
        raise SystemExit(0)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Parsed arguments have `run`, the command's function."""
    parser = _Parser(
        prog=PROGRAM,
        description="Ask vision-language models about images, with a compressed KV cache (VL-Cache).",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _demo(commands)
    _generate(commands)
    _plan(commands)
    _train_demo(commands)
    _study(commands)
    return parser


def _demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "see it work: a small checkpoint answers questions, with the full cache and with a compressed one",
        "demo",
    )
    _policy(parser)
    parser.add_argument(
        "--image",
        type=words.path,
        action="append",
        default=[],
        metavar="FILE",
        help="ask about an image of your own: this model reads only pages, price lists and scenes of the kind it was "
        "trained on, and makes something up for any other image",
    )
    parser.add_argument("--question", type=words.words, metavar="TEXT", help="your question about it")
    parser.add_argument(
        "--assets",
        type=words.path,
        metavar="DIR",
        help="folder with demo_model/ and demo_images/ (default: those of the package)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _explain(parser, "draw what was kept for the first question")
    _compilation_cache(parser)


def _generate(commands: Any) -> None:
    parser = _command(
        commands, "generate", "answer one prompt about some images with a checkpoint of yours", "generate"
    )
    parser.add_argument(
        "--model",
        type=words.path,
        required=True,
        metavar="DIR|ID",
        help="checkpoint folder in the Hugging Face layout, or a model on the Hub, such as llava-hf/llava-1.5-7b-hf",
    )
    _source(parser)
    parser.add_argument(
        "--image", type=words.path, action="append", default=[], metavar="FILE", help="an image; repeat for several"
    )
    parser.add_argument(
        "--prompt",
        type=words.words,
        required=True,
        metavar="TEXT",
        help="your message, put into the checkpoint's chat template (images come first, unless the text places them "
        "with the image placeholder, such as <image>); as it stands with --raw or where there is no template",
    )
    parser.add_argument("--raw", action="store_true", help="use --prompt as it stands, placeholders included")
    _policy(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=words.whole(1),
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="cut the answer there (default: 64)",
    )
    parser.add_argument(
        "--temperature", type=words.number, help="sample at this temperature (default: greedy decoding)"
    )
    parser.add_argument("--top-k", type=words.whole(1), metavar="K", help="sample among the K most probable tokens")
    parser.add_argument(
        "--top-p", type=words.number, metavar="P", help="sample among the tokens that make up probability P"
    )
    parser.add_argument("--seed", type=words.whole(0, 2**64 - 1), default=0, help="of the sampling (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of parameters and cache (default: bfloat16, on CPU float32)",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--stream", action="store_true", help="print the answer as it comes")
    _explain(parser, "draw what was kept")
    _compilation_cache(parser)


def _source(parser: Any) -> None:
    parser.add_argument("--revision", metavar="REV", help="of a model on the Hub: a branch, tag or commit")
    parser.add_argument("--allow-links", action="store_true", help="follow links that lead out of the folder")


def _plan(commands: Any) -> None:
    parser = _command(
        commands, "plan", "see whether a model, a batch and a prompt fit on a TPU slice, without having one", "plan"
    )
    parser.add_argument(
        "--model",
        type=words.path,
        required=True,
        metavar="NAME|DIR|ID",
        help="llava-1.5-7b, llava-v1.6-mistral-7b, llava-v1.6-34b, a folder with a config.json (no weights needed), or "
        "a model on the Hub, of which only the small files are downloaded",
    )
    _source(parser)
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="the slice, such as v5e:2x4, v6e:1x1 or v5p:2x2x1"
    )
    parser.add_argument("--batch", type=words.whole(1), default=1, metavar="N", help="prompts at once (default: 1)")
    parser.add_argument(
        "--prompt",
        type=words.whole(1),
        default=4096,
        metavar="N",
        help="padded prompt length in tokens (default: 4096)",
    )
    parser.add_argument(
        "--new", type=words.whole(1), default=256, metavar="N", help="room for new tokens (default: 256)"
    )
    parser.add_argument(
        "--images", type=words.whole(0), default=1, metavar="N", help="images of each prompt (default: 1)"
    )
    _policy(parser)
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar=POLICY,
        help="another policy to put beside it, such as full_cache or vl_cache:0.3; repeat for several",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="such as data=2,model=4: data splits the batch, model the heads (default: as much model as the KV heads "
        "allow)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of parameters and cache (default: bfloat16)",
    )
    parser.add_argument("--no-search", action="store_true", help="do not look for the largest batch and longest prompt")
    parser.add_argument(
        "--max-compilations",
        type=words.whole(1),
        default=5,
        metavar="N",
        help="prefills compiled for each search at most (default: 5)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _train_demo(commands: Any) -> None:
    parser = _command(commands, "train-demo", "train the demo's checkpoint from scratch", "train_demo")
    parser.add_argument(
        "--output", type=words.path, default="demo_training", metavar="DIR", help="default: demo_training"
    )
    duration = parser.add_mutually_exclusive_group()
    duration.add_argument("--minutes", type=words.number, metavar="M", help="how long to train (default: 60)")
    duration.add_argument("--steps", type=words.whole(1), metavar="N", help="how many steps to train instead")
    parser.add_argument("--resume", action="store_true", help="go on with an earlier run in the same folder")
    _compilation_cache(parser)


def _study(commands: Any) -> None:
    parser = _command(
        commands, "study", "measure what every cache method costs in accuracy, on the demo's checkpoint", "study"
    )
    parser.add_argument(
        "--output",
        type=words.path,
        required=True,
        metavar="DIR",
        help="folder for results.jsonl, tables and pictures; what it already holds is not measured again",
    )
    parser.add_argument(
        "--samples", type=words.whole(1), default=300, metavar="N", help="held-out samples of each task (default: 300)"
    )
    parser.add_argument(
        "--tasks", nargs="+", metavar="NAME", help="of the demo (default: documents, prices, scenes, places)"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME[,OPTION=VALUE]...",
        help="besides the full cache (default: all, and variants of some)",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        metavar="MODE",
        help="known: the question is in the prompt that is compressed; before: it comes afterwards (default: both)",
    )
    parser.add_argument(
        "--budgets", nargs="+", type=words.number, metavar="FRACTION", help="default: 0.01 0.02 0.05 0.1 0.2 0.4 0.6 1"
    )
    parser.add_argument(
        "--batch", type=words.whole(1), default=50, metavar="N", help="prompts answered together (default: 50)"
    )
    parser.add_argument(
        "--assets", type=words.path, metavar="DIR", help="folder with demo_model/ (default: that of the package)"
    )
    _compilation_cache(parser)


def _command(commands: Any, name: str, text: str, module: str) -> argparse.ArgumentParser:
    def run(arguments: argparse.Namespace) -> None:
        with Progress() as progress:
            progress.step("importing JAX")
            with SIGNALS.at_once():
                command = import_module(f"vlcache_jax.cli.{module}")
            command.run(arguments, progress)

    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        default="vl_cache",
        metavar=POLICY,
        help="what to keep (default: vl_cache): a method, its budget (0.1 or 10%% of the prompt's cache, 256 tokens a "
        "layer, 64MiB a prompt, or mass:0.98:0.4) and its options, such as vl_cache:0.05,heads=shared,rows=last:50",
    )


def _explain(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--explain", type=words.path, metavar="OUT.png", help=f"{text}, as a picture")


def _compilation_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="compile anew instead of keeping compiled programs in $VLCACHE_JAX_CACHE_DIR "
        "(default: ~/.cache/vlcache_jax)",
    )
