"""What can be wrong with what the user gave us, and how a launcher ends because of it."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_BAD_INPUT = 2
EXIT_STALLED = 69  # EX_UNAVAILABLE: a peer did not come
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a scheduler may requeue
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report Ctrl-C


class InputError(Exception):
    """Bad configuration or input: one line that says what, where, and what to do about it."""


class FormatError(Exception):
    """What is wrong with the content of a file, without its name."""


class ReportedError(InputError):
    """An InputError that another process of the run met, and says."""


class PreemptedError(Exception):
    """The run was told to stop (SIGTERM, SIGUSR1) and has saved everything."""


class StalledError(Exception):
    """The run was ended because a rank did not come; the watchdog has said so."""


def exit_with_clear_errors(main: Callable[[], object]) -> NoReturn:
    """Runs a launcher's `main` and ends the process with the exit codes that schedulers rely on.

    0 done, 2 bad input (one line, no traceback), 69 a rank did not come, 75 preempted after saving,
    130 Ctrl-C; any other exception is a bug and keeps its traceback.
    """
    code = 0
    try:
        main()
    except InputError as error:
        if not isinstance(error, ReportedError):
            print_clear_line(str(error))
        code = EXIT_BAD_INPUT
    except PreemptedError as stop:
        print(f"\n{stop}", file=sys.stderr, flush=True)
        code = EXIT_PREEMPTED
    except StalledError:
        code = EXIT_STALLED
    except KeyboardInterrupt:
        print("\ninterrupted: start the same command again to go on", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _leave_ranks(code)
    sys.exit(code)


def _leave_ranks(code: int) -> NoReturn:
    """Ends a rank as `sys.exit` does, but for taking the interpreter down.

    While that goes on, threads of gloo may let go of a last tensor, and abort a process that has
    done everything.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code)


def print_clear_line(message: str) -> None:
    """Prints `error: MESSAGE` so that it stands out above a process launcher's own traceback."""
    line = " ".join(message.split())
    print(f"\n{'=' * 80}\nerror: {line}\n{'=' * 80}", file=sys.stderr, flush=True)
