"""Owns the settings of libraries in our scripts: no telemetry, little output, every core, visible errors."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from halfbyte.host import num_cores
from halfbyte.launch import threads_were_chosen


def quiet_libraries() -> None:
    """Silence the libraries; call this before importing torch, transformers, trl or bitsandbytes."""
    use_all_cores()
    keep_few_kernels()
    # TRL contacts the Hub whenever a trainer is built.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # bitsandbytes 0.50 looks for a CPU kernel on the Hub at import and warns if there is none.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\b")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\b")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def use_all_cores() -> None:
    """Undo the default of ``accelerate launch``, which gives each process a single thread.

    accelerate 1.15 sets OMP_NUM_THREADS=1 if it is unset, even for a single process on the CPU, which
    then uses one core. This function gives each process of this machine its share of the cores. It
    takes effect only before torch is imported.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not threads_were_chosen():
        share = num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ["OMP_NUM_THREADS"] = str(max(1, share))


def keep_few_kernels() -> None:
    """Let oneDNN keep 128 compiled kernels instead of 1,024, in this process.

    It compiles one for each shape of a bf16 product, and steps and prompts have hundreds of lengths. With
    all of them kept, 130 steps of SmolLM2-135M took 1.9 GB and the last ones ran at 0.7 times the speed of the
    first. The kernels of decoding fit into this limit; compiling one takes 0.5 ms. It takes effect only
    before the first product (pytorch#98688).
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def disable_cudnn_attention() -> None:
    """Disable PyTorch's cuDNN attention for the whole process.

    cuDNN builds a new plan for each shape, and rows of many lengths have hundreds of shapes: on an H200 in
    bf16 a call took 4 ms of host time.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def hide_harness_bars() -> None:
    """Switch off lm-evaluation-harness's progress bars, for the whole process.

    It shows one for each subject of a group, and lm_eval 0.4.13 has no setting to hide them.
    """
    import lm_eval.api.task as api
    from lm_eval.models import dummy

    api.tqdm = dummy.tqdm = lambda items, **_: items


@contextmanager
def parallel_tokenisers() -> Iterator[None]:
    """Let Rust tokenizers process a batch on every core within the ``with`` block.

    Elsewhere they use one core, as set by ``quiet_libraries``, so that processes can be forked.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
