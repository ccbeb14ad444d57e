"""The arguments. Nothing heavy is imported here, so that help and argument errors come at once."""

import argparse
import sys
from importlib import import_module
from typing import Any, NoReturn

from vlcache_jax.cli.process import BAD_INPUT, PROGRAM, SIGNALS, complain, emit
from vlcache_jax.terminal import defaults, words
from vlcache_jax.terminal.progress import Progress

MAX_NEW_TOKENS = 64
POLICY = "NAME[:BUDGET][,OPTION=VALUE]...[+...]"
KEPT = (
    "what to keep: a method, its budget (0.1 or 10% of the prompt's cache, 256 tokens a layer, 64MiB a prompt, or "
    "mass:0.98:0.4) and its options, such as vl_cache:0.05,heads=shared,rows=last:50; and, behind a +, how prompts are "
    "read: by which pattern, such as x_attention:0.9, and with which visual tokens, such as feather or fast_v:0.25"
)


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

    def value(self, name: str, kind: Any, metavar: str, text: str, default: Any = None, **options: Any) -> None:
        """Adds an option with a value, whose default the help tells."""
        told = "" if default is None else f" (default: {default})"
        self.add_argument(
            name, type=kind, metavar=metavar, default=default, help=(text + told).replace("%", "%%"), **options
        )

    def several(self, name: str, kind: Any, metavar: str, text: str, **options: Any) -> None:
        """Adds an option with a value that may be repeated."""
        self.add_argument(name, type=kind, metavar=metavar, action="append", default=[], help=text, **options)

    def flag(self, name: str, text: str) -> None:
        """Adds an option without a value."""
        self.add_argument(name, action="store_true", help=text)

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
    _evaluate(commands)
    _report(commands)
    _serve(commands)
    _search_heads(commands)
    _train_demo(commands)
    _study(commands)
    return parser


def _demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "see it work: a small checkpoint answers questions, with the full cache and with a compressed one",
    )
    _policy(parser, "vl_cache")  # the method that the model was made for
    parser.several(
        "--image",
        words.path,
        "FILE",
        "ask about an image of your own: this model reads only pages, price lists and scenes of the kind it was "
        "trained on, and makes something up for any other image",
    )
    parser.value("--question", words.words, "TEXT", "your question about it")
    parser.value(
        "--assets", words.path, "DIR", "folder with demo_model/ and demo_images/ (default: those of the package)"
    )
    parser.flag("--json", "print one JSON object")
    _explain(parser, "draw what was kept for the first question")
    _compilation_cache(parser)


def _generate(commands: Any) -> None:
    parser = _command(commands, "generate", "answer one prompt about some images with a checkpoint of yours")
    _model(
        parser,
        "DIR|ID",
        "checkpoint folder in the Hugging Face layout, or a model on the Hub, such as llava-hf/llava-1.5-7b-hf",
    )
    parser.several("--image", words.path, "FILE", "an image; repeat for several")
    parser.several(
        "--video",
        words.video,
        "FILE",
        "a video, among the images in their order, of a model that takes any",
        dest="image",
    )
    parser.value("--frames", words.whole(2), "N", "read so many frames of each video (default: the model's own rule)")
    _image_limit(parser)
    parser.value(
        "--prompt",
        words.words,
        "TEXT",
        "your message, put into the checkpoint's chat template (images and videos come first, unless the text places "
        "them with their placeholders, such as <image>); as it stands with --raw or where there is no template",
        required=True,
    )
    parser.flag("--raw", "use --prompt as it stands, placeholders included")
    _policy(parser)
    parser.value("--max-new-tokens", words.whole(1), "N", "cut the answer there", MAX_NEW_TOKENS)
    parser.value("--temperature", words.number, "T", "sample at this temperature (default: greedy decoding)")
    parser.value("--top-k", words.whole(1), "K", "sample among the K most probable tokens")
    parser.value("--top-p", words.number, "P", "sample among the tokens that make up probability P")
    parser.value("--seed", words.whole(0, 2**64 - 1), "SEED", "of the sampling", 0)
    _dtype(parser, None, "of parameters and cache (default: bfloat16, on CPU float32)")
    _weights(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--stream", action="store_true", help="print the answer as it comes")
    _explain(parser, "draw what was kept")
    _compilation_cache(parser)


def _plan(commands: Any) -> None:
    parser = _command(
        commands, "plan", "see whether a model, a batch and a prompt fit on a TPU slice, without having one"
    )
    _model(
        parser,
        "NAME|DIR|ID",
        "a published model such as llava-v1.6-mistral-7b or qwen2.5-vl-7b (an unknown name lists them), a folder "
        "with a config.json (no weights needed), or a model on the Hub, of which only the small files are downloaded",
    )
    parser.value("--topology", str, "CHIP:SHAPE", "the slice, such as v5e:2x4, v6e:1x1 or v5p:2x2x1", required=True)
    parser.value("--batch", words.whole(1), "N", "prompts at once", 1)
    parser.value("--prompt", words.whole(1), "N", "padded prompt length in tokens", 4096)
    parser.value("--new", words.whole(1), "N", "room for new tokens", 256)
    parser.value("--images", words.whole(0), "N", "images of each prompt", 1)
    _image_limit(parser)
    _policy(parser)
    parser.several(
        "--compare",
        str,
        POLICY,
        "another one to put beside it, such as full_cache or vl_cache:0.3; repeat for several",
    )
    parser.value(
        "--mesh",
        str,
        "AXES",
        "such as data=2,model=4: data splits the batch, model the heads (default: as much model as the KV heads allow)",
    )
    _dtype(parser, "bfloat16", "of parameters and cache (default: bfloat16)")
    _weights(parser)
    parser.value("--train", str, "WHAT", "a train step instead: lora:RANK, all, or paths as decoder/layers,projector")
    parser.value("--accumulate", words.whole(1), "N", "with --train: a batch in so many parts", 1)
    parser.value("--remat", str, "WHAT", "with --train: computed twice: none, projections or layers", "projections")
    parser.value("--rollouts", words.whole(1), "N", "N drawn answers to each prompt instead, by --policy and --compare")
    parser.flag("--no-search", "do not look for the largest batch and longest prompt")
    parser.value("--max-compilations", words.whole(1), "N", "prefills compiled for each search at most", 5)
    parser.flag("--json", "print one JSON object")


def _evaluate(commands: Any) -> None:
    parser = _command(
        commands, "evaluate", "answer all questions of a data set under one policy or several, and score them"
    )
    _model(parser, "DIR|ID", "checkpoint folder in the Hugging Face layout, or a model on the Hub")
    _data(parser)
    parser.several("--policy", str, POLICY, f"{KEPT} (default: {defaults.POLICY}); repeat for several")
    parser.value("--compare", str, POLICY, "compare the others with this one, sample by sample, such as full_cache")
    parser.flag("--divergence", "also how far they are from it, token by token; reads the prompts again")
    parser.value(
        "--out",
        words.path,
        "DIR",
        "folder for run.json and a line for each answer; what it already holds is not answered again",
        required=True,
    )
    parser.value("--limit", words.whole(1), "N", "only the first N samples")
    _image_limit(parser)
    parser.value("--max-new-tokens", words.whole(1), "N", "cut answers there (default: the task's)")
    parser.value("--suffix", words.words, "TEXT", "what follows each question (default: the task's)")
    parser.value("--metric", str, "NAME", "how answers are scored (default: the task's)")
    parser.value("--rows", words.whole(1), "N", "answers decoded at once (default: as many as fit)")
    parser.value("--share", str, "I/N", "answer every N-th sample from the I-th on (0 to N - 1); start N such programs")
    parser.value(
        "--distributed",
        str,
        "HOST:PORT,I/N",
        "share the samples with JAX's other processes: TPU pods, Slurm and Open MPI tell which, or else the value does",
        nargs="?",
        const="auto",
    )
    parser.value("--mesh", str, "AXES", "devices, such as data=4,model=2: data splits the rows, model the heads")
    _dtype(parser, None, "of parameters and cache (default: bfloat16, on CPU float32)")
    _weights(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    _compilation_cache(parser)


def _report(commands: Any) -> None:
    parser = _command(commands, "report", "the tables of evaluations that were run, or are running")
    parser.add_argument("folders", type=words.path, metavar="RUN", nargs="+", help="folder of an evaluation")
    parser.value("--compare", str, POLICY, "compare the others with this one, sample by sample")
    parser.flag("--speed", "also tell samples a second, rows, bytes and devices of the starts that were not killed")
    parser.value("--plots", words.path, "DIR", "draw scores over kept fractions, and samples a second, into DIR")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--markdown", action="store_true", help="print the tables in Markdown")


def _serve(commands: Any) -> None:
    parser = _command(commands, "serve", "answer questions over HTTP, by OpenAI's chat API")
    _model(
        parser, "DIR|ID", "checkpoint folder in the Hugging Face layout, or a model on the Hub, with a chat template"
    )
    parser.value("--name", words.words, "NAME", "by which clients ask for the model (default: the folder's, or the id)")
    _policy(parser)
    parser.value("--host", str, "ADDRESS", "to listen on; 0.0.0.0 for all of this machine", "127.0.0.1")
    parser.value("--port", words.whole(0, 65535), "N", "to listen on; 0 for a free one", 8000)
    parser.value("--rows", words.whole(1), "N", "answers decoded at once (default: as many as fit)")
    parser.value("--max-new-tokens", words.whole(1), "N", "of the longest answer", 512)
    parser.value("--steps", words.whole(1), "N", "tokens between two looks at the answers, which streams wait for", 8)
    parser.value("--top-logprobs", words.whole(0, 20), "N", "the most likeliest tokens that a request may ask for", 0)
    parser.value("--images", words.whole(0, 64), "N", "to compile for prompts of up to N images", 4)
    parser.value("--image-size", str, "WxH", "of the largest usual picture", "1024x1024")
    _image_limit(parser)
    parser.value("--text-tokens", words.whole(1), "N", "of the longest usual text beside the images", 1024)
    parser.several(
        "--bucket",
        str,
        "TOKENS:TILES",
        "to compile for prompts of this size, in place of the last three options; repeat",
    )
    parser.value("--requests", words.whole(1), "N", "at the same time, waiting ones included", 256)
    parser.value("--timeout", words.number, "SECONDS", "until an answer must have ended", 600)
    parser.value("--body-megabytes", words.whole(1, 1024), "N", "of the largest request, its images included", 32)
    parser.value("--megapixels", words.whole(1, 1000), "N", "of all images of a request", 50)
    parser.value("--grace", words.whole(0), "SECONDS", "in which answers may still end after Ctrl-C or SIGTERM", 30)
    parser.value("--mesh", str, "AXES", "devices, such as data=4,model=2: data splits the rows, model the heads")
    _dtype(parser, None, "of parameters and cache (default: bfloat16, on CPU float32)")
    _weights(parser)
    _compilation_cache(parser)


def _search_heads(commands: Any) -> None:
    parser = _command(
        commands,
        "search-heads",
        "find, on long prompts, which pattern of a sparse prefill suits each head, for m_inference:FILE",
    )
    _model(parser, "DIR|ID", "checkpoint folder in the Hugging Face layout, or a model on the Hub")
    _data(parser)
    parser.value("--out", words.path, "FILE.json", "the table of heads, as MInference's own files", required=True)
    parser.value("--limit", words.whole(1), "N", "only the first N samples", 4)
    _image_limit(parser)
    _dtype(parser, None, "of parameters and cache (default: bfloat16, on CPU float32)")
    _weights(parser)
    _compilation_cache(parser)


def _train_demo(commands: Any) -> None:
    parser = _command(commands, "train-demo", "train the demo's checkpoint from scratch")
    parser.value("--output", words.path, "DIR", "for the checkpoint, and what a later run needs", "demo_training")
    duration = parser.add_mutually_exclusive_group()
    duration.add_argument("--minutes", type=words.number, metavar="M", help="how long to train (default: 60)")
    duration.add_argument("--steps", type=words.whole(1), metavar="N", help="how many steps to train instead")
    parser.flag("--resume", "go on with an earlier run in the same folder")
    _compilation_cache(parser)


def _study(commands: Any) -> None:
    parser = _command(commands, "study", "measure what every cache method costs in accuracy, on the demo's checkpoint")
    parser.value(
        "--output",
        words.path,
        "DIR",
        "folder for results.jsonl, tables and pictures; what it already holds is not measured again",
        required=True,
    )
    parser.value("--samples", words.whole(1), "N", "held-out samples of each task", 300)
    parser.value("--tasks", str, "NAME", "of the demo (default: documents, prices, scenes, places)", nargs="+")
    parser.value(
        "--methods",
        str,
        "NAME[,OPTION=VALUE]...",
        "besides the full cache (default: all cache methods, and variants of some); prunings for all pruning methods, "
        "of which the budgets are the part of the visual tokens that stays; patterns for all of the prefill, of which "
        "they are the density",
        nargs="+",
    )
    parser.value(
        "--modes",
        str,
        "MODE",
        "known: the question is in the prompt that is compressed; before: it comes afterwards (default: both)",
        nargs="+",
    )
    parser.value("--budgets", words.number, "FRACTION", "default: 0.01 0.02 0.05 0.1 0.2 0.4 0.6 1", nargs="+")
    parser.value("--batch", words.whole(1), "N", "prompts answered together", 50)
    parser.value("--assets", words.path, "DIR", "folder with demo_model/ (default: that of the package)")
    _compilation_cache(parser)


def _command(commands: Any, name: str, text: str) -> _Parser:
    def run(arguments: argparse.Namespace) -> None:
        with Progress() as progress:
            progress.step("importing JAX")
            with SIGNALS.at_once():
                command = import_module(f"vlcache_jax.cli.{name.replace('-', '_')}")
            command.run(arguments, progress)

    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _model(parser: _Parser, metavar: str, text: str) -> None:
    parser.value("--model", words.path, metavar, text, required=True)
    parser.value("--revision", str, "REV", "of a model on the Hub: a branch, tag or commit")
    parser.flag("--allow-links", "follow links that lead out of the folder")


def _data(parser: _Parser) -> None:
    files = "files, folders or patterns: JSON lines (.jsonl), VLMEvalKit's .tsv or lmms-eval's .parquet"
    parser.value("--data", words.path, "PATH", files, nargs="+", required=True)
    tasks = "jsonl, docvqa, infovqa, textvqa, chartqa, coco_caption, mmmu, mathvista or ocrbench"
    parser.value("--task", str, "NAME", tasks, "jsonl")


def _policy(parser: _Parser, default: str = defaults.POLICY) -> None:
    parser.value("--policy", str, POLICY, KEPT, default)


def _image_limit(parser: _Parser) -> None:
    parser.value(
        "--max-image-tokens",
        words.whole(1),
        "N",
        "make images so small that each is N visual tokens at most, of a model that takes images of any size",
    )


def _dtype(parser: _Parser, default: str | None, text: str) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=default, help=text)


def _weights(parser: _Parser) -> None:
    text = "keep the decoder's projections in 8 or 4 bits (default: as the checkpoint has them)"
    parser.add_argument("--weights", choices=("int8", "int4", "float"), help=text)


def _explain(parser: _Parser, text: str) -> None:
    parser.value("--explain", words.path, "OUT.png", f"{text}, as a picture")


def _compilation_cache(parser: _Parser) -> None:
    parser.flag(
        "--no-compilation-cache",
        "compile anew instead of keeping compiled programs in $VLCACHE_JAX_CACHE_DIR (default: ~/.cache/vlcache_jax)",
    )
