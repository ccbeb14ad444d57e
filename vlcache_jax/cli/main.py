"""The command line: `vlcache-jax` and `python -m vlcache_jax`.

Exit status: 0, 2 for bad arguments or input (one line on standard error, no traceback), 3 when the device's memory did
not suffice, 130 after Ctrl-C, 141 when the reader of standard output has gone.
"""

import os
import sys
from collections.abc import Sequence

from vlcache_jax.cli.parser import PROGRAM, build_parser
from vlcache_jax.errors import VLCacheError

BAD_INPUT, OUT_OF_MEMORY, INTERRUPTED, BROKEN_PIPE = 2, 3, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    Args:
      argv: arguments without the program's name; those of the process by default.
    """
    status = 0
    try:
        try:
            arguments = build_parser().parse_args(argv)
            arguments.run(arguments)
        except SystemExit as stop:  # argparse: --help, --version, bad arguments
            status = stop.code if isinstance(stop.code, int) else 0
        sys.stdout.flush()  # here, where a closed pipe can still be handled
        return status
    except VLCacheError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (RuntimeError, MemoryError) as error:  # RuntimeError: jax.errors.JaxRuntimeError, without importing jax
        if not isinstance(error, MemoryError) and not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        what = (str(error).splitlines() or ["on the host"])[0]
        print(
            f"{PROGRAM}: error: out of memory ({what}): keep less of the cache "
            "(--budget), bound the prefill (--policy-option candidate_fraction=0.3), use fewer or smaller images or "
            f"--dtype bfloat16; `{PROGRAM} plan` tells what fits",
            file=sys.stderr,
        )
        return OUT_OF_MEMORY
    except BrokenPipeError:
        # Python flushes standard output once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
