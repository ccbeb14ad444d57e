"""Renders chat templates in a process of its own, within limits of time and memory.

`template_process` runs this file as a script. It imports jinja2 and the standard library, nothing of this package, so
that it starts in a tenth of a second. A request is a line of JSON, and so is its answer:

    {"template": source, "values": {...}}   ->  {"text": prompt}
    {"template": source}                    ->  {"text": ""}: it parses
    anything that goes wrong                ->  {"error": kind, "message": text}

What takes more than the limits ends the process, however it is written: in a loop, in a filter, in Jinja's compiler.
"""

import contextlib
import datetime
import json
import signal
import sys
from typing import Any, NoReturn

_LIMITS = json.loads(sys.argv[1])  # "path", and the limits "seconds", "bytes" and "characters"
sys.path[:] = _LIMITS["path"]

import jinja2  # noqa: E402
from jinja2 import nodes  # noqa: E402
from jinja2.exceptions import SecurityError  # noqa: E402
from jinja2.ext import Extension, loopcontrols  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402
from jinja2.utils import Namespace  # noqa: E402

_KEPT_TEMPLATES = 16
_MESSAGE = 300  # characters of an error message


class _RefusedError(jinja2.TemplateError):
    """What `raise_exception` raises in a template."""


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is only passed through."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's protocol)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # Jinja would go on with an undefined value and complain only if that is used further.
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")


class _Namespace(Namespace):
    """Without names such as `__class__`, by which a value could pass for one of another type."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **attributes)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace with the attribute {name!r}")


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a prompt must not have.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _answer(request: dict[str, Any], environment: _Sandbox, templates: dict[str, jinja2.Template]) -> dict[str, str]:
    source = request["template"]
    try:
        if source not in templates:
            template = environment.from_string(source)
            if len(templates) >= _KEPT_TEMPLATES:
                templates.pop(next(iter(templates)))
            templates[source] = template
    except MemoryError:
        return {"error": "memory", "message": ""}
    except Exception as error:  # what Jinja compiles to need not be valid Python either
        return _error("parse", error)
    if "values" not in request:
        return {"text": ""}
    try:
        text = templates[source].render(**request["values"])
    except MemoryError:
        return {"error": "memory", "message": ""}
    except _RefusedError as error:
        return {"error": "refused", "message": str(error)[:_MESSAGE]}
    except SecurityError as error:
        return {"error": "forbidden", "message": str(error)[:_MESSAGE]}
    except Exception as error:  # a template can fail in as many ways as a program
        return _error("fails", error)
    if len(text) > _LIMITS["characters"]:
        return {"error": "length", "message": str(len(text))}
    return {"text": text}


def _error(kind: str, error: Exception) -> dict[str, str]:
    return {"error": kind, "message": f"{type(error).__name__}: {error}"[:_MESSAGE]}


def _limit_memory(size: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows, where the time alone is limited
        return
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as stream:
        size += int(stream.read().split()[0]) * resource.getpagesize()  # beyond what is mapped already (Linux)
    # Nor does a template have anything to write: no file may grow.
    for limit, value in ((resource.RLIMIT_AS, size), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS knows the name of a limit that it cannot set
            resource.setrlimit(limit, (value, value))


def _limit_time(seconds: float) -> None:
    if hasattr(signal, "setitimer"):  # its signal, unhandled, ends the process even within a long C function
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _unhandle_signal() -> None:
    if hasattr(signal, "setitimer"):  # a child inherits what its parent ignores or blocks
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})


def main() -> None:
    """Answers requests until the input ends."""
    environment = _environment()
    templates: dict[str, jinja2.Template] = {}
    _limit_memory(_LIMITS["bytes"])
    _unhandle_signal()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        _limit_time(_LIMITS["seconds"])
        try:
            answer = json.dumps(_answer(json.loads(line), environment, templates))
        except MemoryError:
            answer = '{"error": "memory", "message": ""}'
        except RecursionError:
            answer = '{"error": "fails", "message": "messages nested too deeply"}'
        _limit_time(0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
