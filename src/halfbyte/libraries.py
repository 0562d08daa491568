"""Owns how the libraries behave in our scripts: no telemetry, no chatter, errors still shown."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Call before importing transformers, trl or bitsandbytes."""
    # TRL pings the Hub on every trainer that is built.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # bitsandbytes 0.50 looks for a CPU kernel on the Hub at import and warns when it is not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\b")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\b")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
