"""Owns the combinations of versions that are known to break a training, or to spoil it in silence, with sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

GITHUB = "https://github.com"
# Oldest driver with which builds for a CUDA version run: NVIDIA, "CUDA minor version compatibility".
DRIVERS = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class KnownBad:
    """A combination that does not work.

    Attributes:
        versions: library → versions, as in a requirement. All are installed in these.
        effect: what goes wrong.
        remedy: the line that mends it.
        source: where it was reported.
    """

    versions: dict[str, str]
    effect: str
    remedy: str
    source: str


@dataclass(frozen=True)
class VersionFault:
    """What is wrong with what is installed, and the line that mends it."""

    fact: str
    remedy: str


KNOWN_BAD = (
    KnownBad(
        {"transformers": "<4.46"},
        "with accumulation, losses of micro-batches count alike however many tokens they have",
        "pip install -U halfbyte",
        f"{GITHUB}/huggingface/transformers/pull/34191",
    ),
    KnownBad(
        {"transformers": ">=4.46,<4.48.1"},
        "with accumulation, losses and gradients are too large",
        "pip install -U halfbyte",
        f"{GITHUB}/huggingface/transformers/pull/35438",
    ),
    KnownBad(
        {"transformers": ">=5", "peft": "<0.18"},
        "importing peft fails: HybridCache is gone",
        "pip install -U peft",
        f"{GITHUB}/Azure/azureml-assets/pull/5004",
    ),
    KnownBad(
        {"peft": ">=0.19", "torchao": "<0.16"},
        "peft refuses any LoRA beside an old torchao, even if it is not used",
        "pip uninstall -y torchao",
        f"{GITHUB}/PrunaAI/pruna/pull/630",
    ),
    KnownBad(
        {"torchao": ">=0.18", "torch": "<2.11"},
        "importing torchao fails",
        "pip uninstall -y torchao",
        f"{GITHUB}/daydreamlive/DEMON/pull/325",
    ),
    KnownBad(
        {"trl": "<0.29", "transformers": ">=5.3"},
        "trl takes optional packages for installed, and imports them",
        "pip install -U trl",
        f"{GITHUB}/MakazhanAlpamys/Soup/issues/503",
    ),
    KnownBad(
        {"trl": "<0.12", "transformers": ">=5"},
        "trl's own trainer passes an argument that is gone",
        "pip install -U trl",
        f"{GITHUB}/huggingface/trl/issues/6168",
    ),
    KnownBad(
        {"accelerate": "<1.3", "transformers": ">=4.52"},
        "training ends at its start: unwrap_model knows no keep_torch_compile",
        "pip install -U accelerate",
        f"{GITHUB}/huggingface/transformers/pull/38339",
    ),
    KnownBad(
        {"transformers": "<5", "huggingface_hub": ">=1"},
        "importing transformers fails: it wants an older huggingface_hub",
        "pip install -U transformers",
        f"{GITHUB}/huggingface/transformers/pull/41973",
    ),
    KnownBad(
        {"transformers": ">=4.52", "torch": "<2.6"},
        "weights and optimizer states in .bin and .pt files are not loaded (CVE-2025-32434)",
        "pip install -U torch",
        f"{GITHUB}/huggingface/transformers/pull/37785",
    ),
    KnownBad(
        {"bitsandbytes": "<0.45.1", "triton": ">=3.2"},
        "importing bitsandbytes fails: triton.ops is gone",
        "pip install -U bitsandbytes",
        f"{GITHUB}/bitsandbytes-foundation/bitsandbytes/pull/1493",
    ),
    KnownBad(
        {"bitsandbytes": "==0.48.0"},
        "int8 checkpoints of earlier versions are loaded broken, in silence",
        "pip install -U bitsandbytes",
        f"{GITHUB}/bitsandbytes-foundation/bitsandbytes/issues/1775",
    ),
    KnownBad(
        {"torch": "<2.3", "numpy": ">=2"},
        "torch cannot use numpy",
        "pip install -U torch",
        f"{GITHUB}/pytorch/pytorch/issues/132179",
    ),
    KnownBad(
        {"datasets": "<2.14.7", "pyarrow": ">=21"},
        "importing datasets fails: PyExtensionType is gone",
        "pip install -U datasets",
        f"{GITHUB}/apache/arrow/issues/47155",
    ),
    KnownBad(
        {"wandb": "==0.26.0", "protobuf": "<6.32.1"},
        "importing wandb fails: its messages need a newer protobuf",
        "pip install -U wandb",
        f"{GITHUB}/wandb/wandb/issues/11758",
    ),
)


def libraries() -> list[str]:
    """Return the libraries that the table and halfbyte's own requirements name."""
    named = [library for bad in KNOWN_BAD for library in bad.versions]
    return list(dict.fromkeys([*named, *(need.name for need in _requirements())]))


def known_faults(installed: Mapping[str, str | None]) -> Iterator[VersionFault]:
    """Yield what is wrong with these versions: combinations of the table, and what halfbyte's own needs refuse.

    Args:
        installed: library → its version; None, or no entry, for one that is not installed.
    """
    versions = {}
    for library, text in installed.items():
        try:
            versions[library] = Version(text or "")
        except InvalidVersion:
            continue
    for bad in KNOWN_BAD:
        if all(_is_in(versions.get(library), wanted) for library, wanted in bad.versions.items()):
            named = " with ".join(f"{library} {versions[library]}" for library in bad.versions)
            yield VersionFault(f"{named}: {bad.effect} ({bad.source})", bad.remedy)
    for need in _requirements():
        version = versions.get(need.name.replace("-", "_"), versions.get(need.name))
        if version is not None and not need.specifier.contains(version, prereleases=True):
            fact = f"{need.name} {version}; halfbyte needs {need.name}{need.specifier}"
            yield VersionFault(fact, f'pip install "{need.name}{need.specifier}"')


def oldest_driver(cuda: str) -> int | None:
    """Return the oldest major version of the NVIDIA driver for builds of this CUDA version; None if unknown."""
    return DRIVERS.get(int(cuda.partition(".")[0]))


def _is_in(version: Version | None, wanted: str) -> bool:
    return version is not None and SpecifierSet(wanted).contains(version, prereleases=True)


def _requirements() -> list[Requirement]:
    """Return what halfbyte needs always: its optional parts are not among it."""
    needs = [Requirement(text) for text in metadata.requires("halfbyte") or []]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
