"""The command line: `vlcache-jax` and `python -m vlcache_jax`.

Exit status: 0; 1 when something failed (a full disk, a closed standard output); 2 for bad arguments or input; 3 when
the device's memory did not suffice; 130 after Ctrl-C, 143 after SIGTERM; 141 when the reader of standard output has
gone. Errors are one line on standard error. A traceback is a fault of this program.
"""

import errno
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from vlcache_jax.cli.process import (
    BAD_INPUT,
    BROKEN_PIPE,
    FAILURE,
    OUT_OF_MEMORY,
    PROGRAM,
    SIGNALS,
    Failed,
    complain,
    leave,
    prepare_streams,
    remark,
    writing_output,
)

INTERRUPTED = 130
_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # of the machine, whatever was asked for


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    Args:
      argv: arguments without the program's name; those of the process by default, whose signals and standard streams
        are then looked after, too.
    """
    if argv is not None:
        return _run(argv)
    try:
        prepare_streams()
        SIGNALS.listen()
        status = _run(None)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Failed as failure:
        complain(str(failure))
        return FAILURE
    except BaseException:
        if SIGNALS.status is None:
            raise
        status = INTERRUPTED  # a library made something else of the interrupt
    if SIGNALS.status is not None:
        leave(SIGNALS.status)
    return status


def _run(argv: Sequence[str] | None) -> int:
    from vlcache_jax.cli.parser import build_parser  # when signals are looked after
    from vlcache_jax.errors import VLCacheError

    status = 0
    try:
        try:
            arguments = build_parser().parse_args(argv)
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                arguments.run(arguments)
        except SystemExit as stop:  # argparse: --help, --version, bad arguments
            status = stop.code if isinstance(stop.code, int) else 0
        with writing_output():  # here, where a closed pipe can still be handled
            sys.stdout.flush()
        return status
    except VLCacheError as error:
        complain(str(error))
        cause = error.__cause__
        return FAILURE if isinstance(cause, OSError) and cause.errno in _FAILURES else BAD_INPUT
    except (RuntimeError, MemoryError) as error:  # RuntimeError: jax.errors.JaxRuntimeError, without importing jax
        if not isinstance(error, MemoryError) and not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        what = (str(error).splitlines() or ["on the host"])[0]
        complain(
            f"out of memory ({what}): keep less of the cache "
            "(--policy vl_cache:0.05), bound the prefill (candidate_fraction=0.2), use fewer or smaller images or "
            f"--dtype bfloat16; `{PROGRAM} plan` tells what fits"
        )
        return OUT_OF_MEMORY
    except BrokenPipeError:
        return BROKEN_PIPE
    except (Failed, OSError) as error:
        complain(str(error))
        return FAILURE
    except KeyboardInterrupt:
        return INTERRUPTED


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, without the place in the code that Python shows."""
    remark(f"{PROGRAM}: warning: {message}")
