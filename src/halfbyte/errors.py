"""Owns the errors that a user can cause and fix.

    UserError
    ├── ConfigError   a config file, an override or the environment is wrong
    ├── DataError     a dataset, a row, a chat template or a split is wrong
    ├── ModelError    a model cannot be found, read, loaded or adapted as requested
    │   └── UntraceableError  its training step cannot be planned
    ├── PlanError     a request cannot be planned, or cannot fit
    ├── RunError      a run folder lacks something, or a run cannot go on
    └── StoppedError  a signal stopped a run, which can go on where it was

A script prints such an error without a traceback and exits with ``exit_code``.
Every message says where the fault is, what was found, what is allowed and what to do next.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable

from halfbyte.faults import machine_fault


class UserError(Exception):
    """An error that the user can fix."""

    exit_code = 1
    label = "error"


class ConfigError(UserError):
    """A config has one or more faults; ``faults`` holds one line for each."""

    exit_code = 2

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


class DataError(UserError):
    """A dataset, a row, a chat template or a split is wrong."""


class ModelError(UserError):
    """A model cannot be found, read, loaded or adapted as requested."""


class UntraceableError(ModelError):
    """A model's training step cannot be traced without data, so it cannot be planned."""


class PlanError(UserError):
    """A request cannot be planned, or cannot fit; no compute has been spent."""

    exit_code = 2


class RunError(UserError):
    """A run folder lacks something, or a run cannot go on."""


class StoppedError(UserError):
    """A signal stopped a run, which can go on where it was."""

    label = "stopped"

    def __init__(self, number: int, step: int, command: str) -> None:
        self.exit_code = 128 + number  # as a shell reports it
        super().__init__(
            f"signal {number}, after step {step}, which is saved. Go on with: {command}"
        )


def last_line(text: str) -> str:
    """Return the last line that a failed process printed, for a message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it does not say why"


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; what runs ends as after Ctrl-C."""


def exit_on_user_error(main: Callable[[], None], exit_code: int | None = None) -> None:
    """Run a script's ``main``; of a UserError, a fault of the machine or a signal print a message, and exit.

    The exit code is the error's, unless the script passes its own; after a signal it is 128 and its number.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name of a file or of a key may be no text
            stream.reconfigure(errors="backslashreplace")
    _end_on_sigterm()
    try:
        main()
    except UserError as error:
        _tell(f"{error.label}: {error}", error)
        raise SystemExit(exit_code or error.exit_code) from None
    except BrokenPipeError:  # the reader of our output has exited, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        _tell(f"stopped: {number.name}", error)
        raise SystemExit(128 + number) from None
    except Exception as error:
        fault = machine_fault(error)
        if not fault:
            raise
        _tell(f"error: {fault}", error)
        raise SystemExit(1) from error


def _end_on_sigterm() -> None:
    def end(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def _tell(message: str, error: BaseException) -> None:
    print("\n".join([message, *getattr(error, "__notes__", ())]), file=sys.stderr)
