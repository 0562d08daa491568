"""Owns the errors that a user can cause and mend.

    UserError
    ├── ConfigError   a config file, an override or the environment is wrong
    ├── DataError     a dataset, a row, a chat template or a split is wrong
    ├── ModelError    a model cannot be found, read, loaded or adapted as asked
    │   └── UntraceableError  its step cannot be planned
    ├── PlanError     what is asked for cannot be planned, or cannot fit
    └── RunError      a run folder lacks something, or a run cannot go on

A script prints such an error without a traceback and exits with ``exit_code``.
Every message says where, what came, what is allowed and what to do next.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

# In the messages of allocators that raise a plain RuntimeError: PyTorch's on Linux and on Windows, CUDA's,
# HIP's and MPS's, and those of their libraries (cuBLAS, cuDNN, cuSOLVER).
OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",
)


class UserError(Exception):
    """Something that the person at the keyboard can put right."""

    exit_code = 1


class ConfigError(UserError):
    """One or more faults in a config; ``faults`` holds one line for each."""

    exit_code = 2

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


class DataError(UserError):
    """A dataset, a row, a chat template or a split is wrong."""


class ModelError(UserError):
    """A model cannot be found, read, loaded or adapted as asked."""


class UntraceableError(ModelError):
    """A model whose training step cannot be run without data, and so not be planned."""


class PlanError(UserError):
    """What is asked for cannot be planned, or cannot fit; no compute has been spent."""

    exit_code = 2


class RunError(UserError):
    """A run folder lacks something, or a run cannot go on."""


def last_line(text: str) -> str:
    """What a process that failed said last, for a message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it does not say why"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, says that memory ran out."""
    # torch.OutOfMemoryError by its name, so that torch is not imported here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def exit_on_user_error(main: Callable[[], None], exit_code: int | None = None) -> None:
    """Run a script's ``main``; end with the message alone on a UserError.

    The exit code is that of the error, unless the script has one of its own.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
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
    except BrokenPipeError:  # the reader of our output has gone, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
