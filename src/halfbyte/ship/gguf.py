"""Owns the GGUF artefacts, which hold the merged model or only the adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from halfbyte.llamacpp.library import FTYPES
from halfbyte.llamacpp.tools import convert, quantise
from halfbyte.model.resolve import fp32_bytes
from halfbyte.run_dir import write_text
from halfbyte.ship.measured_run import MeasuredRun
from halfbyte.ship.modelfile import modelfile
from halfbyte.trained.run import TrainedRun

CONVERTED = ("f32", "f16", "bf16", "q8_0")  # types that the converter writes by itself
LOSSLESS = ("f32", "f16", "bf16")
QUANTS = (*CONVERTED, *(name for name in FTYPES if name not in CONVERTED))
MODELFILE = "Modelfile"


class GgufFactory:
    """Makes GGUF files of one merged model; the source of the quantised files is made once."""

    def __init__(self, measured: MeasuredRun, scratch: Path) -> None:
        self._measured, self._trained, self._scratch = measured, measured.trained, scratch

    def make(self, quant: str, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Write the file and its Modelfile into ``folder``; return it and how it was made.

        Raises:
            ModelError: the converter does not support the architecture, or there is no quantiser.
        """
        path = folder / f"{self._trained.run.name}-{quant}.gguf"
        method: dict[str, Any] = {"quant": quant}
        if quant in CONVERTED:
            self._convert(quant, path)
        else:
            source = self._scratch / "source.gguf"
            if not source.is_file():
                self._convert("f32" if self._has_room else "auto", source)
            method["quantiser"] = quantise(source, path, quant)
        method["ollama"] = self._write_modelfile(path)
        return path, method

    def base_file(self) -> Path:
        """Convert the unquantised base to 16 bits, to prove an adapter exported alone."""
        path = self._scratch / "base.gguf"
        if not path.is_file():
            base = self._trained.base.path
            arguments = [base, "--outtype", "f16", "--outfile", str(path)]
            convert("convert_hf_to_gguf.py", [*arguments, "--model-name", "base"], base)
        return path

    @property
    def _has_room(self) -> bool:
        """Whether the disk has room for a source in fp32, which avoids rounding."""
        merged = self._trained.folder.merged
        return 2 * fp32_bytes(merged) < shutil.disk_usage(merged).free

    def _convert(self, outtype: str, path: Path) -> None:
        merged, name = self._trained.folder.merged, str(self._trained.run.name)
        arguments = [str(merged), "--outtype", outtype, "--outfile", str(path)]
        convert("convert_hf_to_gguf.py", [*arguments, "--model-name", name], str(merged))

    def _write_modelfile(self, path: Path) -> str:
        renderer = self._trained.renderer
        text = modelfile(
            path.name,
            renderer.prompt_text,
            renderer.tokenizer.bos_token,
            [str(renderer.tokenizer.convert_ids_to_tokens(i)) for i in renderer.stop_ids],
            [row.messages for row in self._measured.conversations],
        )
        if text is None:
            return "no Modelfile: Go's templates cannot say what this chat template says"
        write_text(path.parent / MODELFILE, text)
        return MODELFILE


def make_adapter_gguf(trained: TrainedRun, folder: Path) -> Path:
    """Write only the trained adapter as GGUF, for use with a GGUF of its base.

    Raises:
        ModelError: the converter does not support the architecture or the kind of adapter.
    """
    path = folder / f"{trained.run.name}-lora-f32.gguf"
    arguments = [str(trained.folder.adapter), "--base", trained.base.path, "--outfile", str(path)]
    convert(
        "convert_lora_to_gguf.py", [*arguments, "--outtype", "f32"], str(trained.folder.adapter)
    )
    return path
