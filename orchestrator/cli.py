"""The `longstride` command: runs what was asked, and answers mistakes.

Commands live in `commands`, imported when one is run; what can be asked is in `arguments`. Exit codes: 0 done; 1 a run
failed; 2 a mistake in what was asked; 130 interrupted; 143 terminated. A mistake is one line on stderr;
LONGSTRIDE_TRACEBACK=1 shows where it was found.
"""

from __future__ import annotations

import contextlib
import keyword
import os
import sys
import time
import traceback
from collections.abc import Sequence

from .ending import Ending
from .failures import EchoOfMistake, RunFailed, Terminated, is_mistake, is_outage, one_line
from .parser import MISTAKE, build_parser, parse

FAILED, INTERRUPTED, TERMINATED = 1, 130, 143
ECHO_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. Without arguments it is the process's own command, and its end."""
    if arguments is not None:
        return _run(arguments)
    ending = Ending()
    try:
        ending.code = _run(sys.argv[1:])
    except Exception:
        ending.code = FAILED
        raise
    return ending.code


def _run(arguments: Sequence[str]) -> int:
    namespace = parse(arguments)
    if namespace.version:
        from importlib.metadata import version

        print(f"longstride {version('longstride')}")
        return 0
    if namespace.command is None:
        build_parser().print_help()
        return 0
    try:
        from . import commands

        name = namespace.command
        return getattr(commands, f"{name}_" if keyword.iskeyword(name) else name)(namespace)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EchoOfMistake as echo:
        return _echo(echo)
    except RunFailed as failure:
        return _report(failure, FAILED, failure.details)
    except KeyboardInterrupt as interrupt:
        return _report(interrupt, INTERRUPTED, default="interrupted")
    except Terminated as signal:
        return _report(signal, TERMINATED, default="terminated")
    except Exception as error:
        if is_outage(error):
            return _report(error, FAILED)
        if not is_mistake(error):
            raise
        return _report(error, MISTAKE)


def _echo(echo: EchoOfMistake) -> int:
    """Leaves the first process the time to speak: launchers end all processes with the first that fails.

    One that is still there afterwards has found what the first has not, such as a file missing on its node.
    """
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(ECHO_SECONDS)
        if str(echo):
            print(f"longstride: process {os.environ.get('RANK')}: {echo}", file=sys.stderr)
    return MISTAKE


def _report(error: BaseException, code: int, details: str = "", default: str = "") -> int:
    """One line on stderr; with LONGSTRIDE_TRACEBACK=1 the traceback before it. Secrets in URLs are masked."""
    from ..data.credentials import mask_credentials  # slow to import, and --help needs none of it

    if os.environ.get("LONGSTRIDE_TRACEBACK"):
        print(mask_credentials(details or "".join(traceback.format_exception(error))), file=sys.stderr)
    print(mask_credentials(f"longstride: {one_line(error) if str(error) else default}"), file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
