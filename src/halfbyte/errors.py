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
import sys
from collections.abc import Callable

# Texts in the messages of allocators that raise a plain RuntimeError: PyTorch's on Linux and Windows,
# CUDA's, HIP's and MPS's, and those of their libraries (cuBLAS, cuDNN, cuSOLVER).
OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",
)


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
            f"signal {number}, after step {step}, which is saved. Go on with: accelerate launch {command}"
        )


def last_line(text: str) -> str:
    """Return the last line that a failed process printed, for a message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it does not say why"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, means that memory ran out."""
    # torch.OutOfMemoryError is matched by name, to avoid importing torch here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def exit_on_user_error(main: Callable[[], None], exit_code: int | None = None) -> None:
    """Run a script's ``main``; on a UserError print only its message and exit.

    The exit code is the error's, unless the script passes its own.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name of a file or of a key may be no text
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"{error.label}: {error}", file=sys.stderr)
        raise SystemExit(exit_code or error.exit_code) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: the device ran out of memory: {error}\nUse a smaller train.micro_batch_size,"
            " train.checkpointing=on, a shorter data.max_length, or eval.batch_size when comparing",
            file=sys.stderr,
        )
        raise SystemExit(1) from error
    except BrokenPipeError:  # the reader of our output has exited, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
