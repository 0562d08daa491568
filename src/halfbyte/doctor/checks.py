"""Owns the checks of a machine: each finds a fact, says whether it is in order, and what mends it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from halfbyte.doctor.known_bad import known_faults, libraries, oldest_driver
from halfbyte.errors import UserError
from halfbyte.host import attempt, cpu_model, driver_version, gib, host_facts, num_cores, ram_bytes
from halfbyte.run_dir import cache_dir

OK, WARNING, WRONG = "ok", "warning", "wrong"
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "triton",
    "wandb",
)
NEEDED_DISK_BYTES = 20 << 30  # of a 4-bit run of a 7B model: its 16-bit base, checkpoints, merge
NEEDED_RAM_BYTES = 8 << 30


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        name: of the check.
        state: ``ok``, ``warning`` (it works, but slowly or in part) or ``wrong``.
        fact: in words, without secrets.
        remedy: the line that mends it; "" if nothing is to be mended.
    """

    name: str
    state: str
    fact: str
    remedy: str = ""

    def as_text(self) -> str:
        """Return the check as lines to print."""
        line = f"{self.state:<8} {self.name:<12} {self.fact}"
        return f"{line}\n{'':<22}→ {self.remedy}" if self.remedy else line

    def as_json(self) -> dict[str, Any]:
        """Return the check for a program, and for others to read: the home folder is ``~``."""
        return asdict(self) | {"fact": self.fact.replace(str(Path.home()), "~")}


def run_checks() -> Iterator[Check]:
    """Yield what each check finds; one that itself fails is wrong."""
    for name, check in CHECKS.items():
        try:
            yield from check(name)
        except UserError as error:
            yield Check(name, WRONG, str(error))
        except Exception as error:  # a machine can be broken in any way, and that is to be said
            yield Check(name, WRONG, f"{type(error).__name__}: {error}")


def versions() -> dict[str, str | None]:
    """Return the versions of the libraries that a training needs; None for one that is not there."""
    return {name: _version(name) for name in LIBRARIES}


def _version(library: str) -> str | None:
    return attempt(lambda: metadata.version(library))


def _machine(name: str) -> Iterator[Check]:
    yield Check(name, OK, "; ".join(host_facts()))


def _gpu(name: str) -> Iterator[Check]:
    import torch

    driver = driver_version()
    if not torch.cuda.is_available():
        oldest = oldest_driver(torch.version.cuda) if torch.version.cuda else None
        if driver is None:
            yield Check(name, OK, "none: training runs on the CPU")
        elif oldest is not None and int(driver.partition(".")[0]) < oldest:
            yield Check(
                name,
                WRONG,
                f"driver {driver} is too old for this torch, which was built for CUDA {torch.version.cuda}",
                f"install driver {oldest} or newer, or a build of torch for an older CUDA",
            )
        else:
            yield Check(
                name,
                WRONG,
                f"driver {driver} is here, but this torch ({torch.__version__}) cannot use it",
                "pip install --force-reinstall torch   (the build for CUDA; see pytorch.org)",
            )
        return
    built = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        capability = f"sm_{card.major}{card.minor}"
        fact = f"{card.name}, {gib(card.total_memory)}, {capability}, driver {driver}, CUDA {torch.version.cuda}"
        # A build runs on later cards of its generation, and others if it holds PTX.
        runs = any(_runs_on(code, card.major, card.minor) for code in built)
        remedy = (
            f"install a build of torch that names {capability}; this one names {' '.join(built)}"
        )
        yield Check(name, OK if runs else WRONG, fact, "" if runs else remedy)


def _runs_on(code: str, major: int, minor: int) -> bool:
    kind, _, number = code.partition("_")
    digits = "".join(character for character in number if character.isdigit())
    if len(digits) < 2:
        return False
    its_major, its_minor = int(digits[:-1]), int(digits[-1])
    if kind == "compute":
        return (its_major, its_minor) <= (major, minor)
    return its_major == major and its_minor <= minor


def _versions(name: str) -> Iterator[Check]:
    installed = versions()
    line = ", ".join(f"{library} {version}" for library, version in installed.items() if version)
    lacking = [library for library in LIBRARIES[:9] if not installed[library]]
    if lacking:
        yield Check(name, WRONG, f"{', '.join(lacking)} is missing", "pip install halfbyte")
    yield Check(name, OK, line)
    for fault in known_faults({library: _version(library) for library in libraries()}):
        yield Check(name, WRONG, fault.fact, fault.remedy)


def _quantisation(name: str) -> Iterator[Check]:
    import torch
    from bitsandbytes import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    packed, state = functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    error = float((functional.dequantize_4bit(packed, state) - weights).abs().max())
    works = error < 0.2  # the widest gap between two levels of NF4 is 0.3
    fact = f"bitsandbytes quantises to NF4 on {device}, with an error of {error:.3f}"
    yield Check(name, OK if works else WRONG, fact, "" if works else "pip install -U bitsandbytes")


def _speed(name: str) -> Iterator[Check]:
    threads = os.environ.get("OMP_NUM_THREADS")
    cores = num_cores()
    if threads and threads.isdigit() and int(threads) < cores:
        fact = f"OMP_NUM_THREADS is {threads}, and there are {cores} cores"
        yield Check(name, WARNING, fact, "unset OMP_NUM_THREADS")
    import torch

    from halfbyte.model.precision import gemm_seconds

    if torch.cuda.is_available():
        yield Check(name, OK, f"{cores} cores beside the GPU")
        return
    ratio = gemm_seconds(torch.bfloat16) / gemm_seconds(torch.float32)
    fact = f"{cpu_model()}: a product in bf16 takes {ratio:.2f} times that in fp32"
    yield Check(name, OK, f"{fact}; model.compute_dtype=auto takes the faster")


def _memory(name: str) -> Iterator[Check]:
    total, free = ram_bytes()
    fact = f"{gib(free)} of {gib(total)} free"
    enough = free >= NEEDED_RAM_BYTES
    remedy = "" if enough else "close other programs, or plan a small model: halfbyte plan CONFIG"
    yield Check(name, OK if enough else WARNING, fact, remedy)


def _disk(name: str) -> Iterator[Check]:
    for what, folder in (("here", Path.cwd()), ("the Hub's cache", _hub_cache())):
        existing = next(path for path in (folder, *folder.parents) if path.is_dir())
        free = shutil.disk_usage(existing).free
        enough = free >= NEEDED_DISK_BYTES
        remedy = f"make room; a 7B model takes about {gib(NEEDED_DISK_BYTES)} with its checkpoints"
        fact = f"{gib(free)} free for {what}"
        yield Check(name, OK if enough else WARNING, fact, "" if enough else remedy)


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _hub(name: str) -> Iterator[Check]:
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE", "yes", "on"):
        yield Check(
            name, WARNING, "HF_HUB_OFFLINE is set: nothing is downloaded", "unset HF_HUB_OFFLINE"
        )
    elif get_token() is None:
        fact = "not logged in: models with a licence to accept (Gemma, Llama) cannot be downloaded"
        yield Check(name, WARNING, fact, "hf auth login")
    else:
        yield Check(name, OK, "a token is stored")


def _wandb(name: str) -> Iterator[Check]:
    from halfbyte.tracking import choose_mode

    if find_spec("wandb") is None:
        yield Check(name, OK, "not installed; metrics.jsonl has all numbers")
        return
    mode = choose_mode("auto")
    remedy = (
        "wandb login   (or leave it: metrics.jsonl has all numbers)" if mode == "offline" else ""
    )
    yield Check(name, OK, f"track.wandb=auto records {mode}", remedy)


def _llama_cpp(name: str) -> Iterator[Check]:
    from halfbyte.errors import ModelError
    from halfbyte.llamacpp.tools import GET, converter, library_path

    for what, find in (("library", library_path), ("converter for --to gguf", converter)):
        try:
            yield Check(name, OK, f"{what}: {find()}")
        except ModelError:
            yield Check(name, WARNING, f"no {what}: no GGUF can be made or run", GET)


def _cache(name: str) -> Iterator[Check]:
    folder = cache_dir()
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    yield Check(name, OK, f"{folder}: {gib(sum(sizes))} (prepared rows, converted models, tools)")


CHECKS: dict[str, Callable[[str], Iterator[Check]]] = {
    "machine": _machine,
    "gpu": _gpu,
    "versions": _versions,
    "4-bit": _quantisation,
    "speed": _speed,
    "memory": _memory,
    "disk": _disk,
    "hub": _hub,
    "wandb": _wandb,
    "llama.cpp": _llama_cpp,
    "cache": _cache,
}
