"""Owns GGUF artefacts: the merged model or the adapter alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from halfbyte.llamacpp.library import FTYPES
from halfbyte.llamacpp.tools import convert, quantise
from halfbyte.run_dir import write_text
from halfbyte.ship.modelfile import modelfile
from halfbyte.ship.work import Work

CONVERTED = ("f32", "f16", "bf16", "q8_0")  # what the converter writes by itself
LOSSLESS = ("f32", "f16", "bf16")
QUANTS = (*CONVERTED, *(name for name in FTYPES if name not in CONVERTED))
MODELFILE = "Modelfile"


class GgufFactory:
    """Makes GGUF files of one merged model; what quantised ones are made from is made once."""

    def __init__(self, work: Work, scratch: Path) -> None:
        self._work, self._scratch = work, scratch

    def make(self, quant: str, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Write the file and its Modelfile into ``folder``; returns it and how it was made.

        Raises:
            ModelError: the converter does not know the architecture, or there is no quantiser.
        """
        path = folder / f"{self._work.run.name}-{quant}.gguf"
        made: dict[str, Any] = {"quant": quant}
        if quant in CONVERTED:
            self._convert(quant, path)
        else:
            source = self._scratch / "source.gguf"
            if not source.is_file():
                self._convert("f32" if self._has_room else "auto", source)
            made["quantiser"] = quantise(source, path, quant)
        made["ollama"] = self._write_modelfile(path)
        return path, made

    def base_file(self) -> Path:
        """The unquantised base in 16 bits, for the proof of an adapter alone."""
        path = self._scratch / "base.gguf"
        if not path.is_file():
            base = self._work.base.path
            arguments = [base, "--outtype", "f16", "--outfile", str(path)]
            convert("convert_hf_to_gguf.py", [*arguments, "--model-name", "base"], base)
        return path

    @property
    def _has_room(self) -> bool:
        """Whether the source of quantised files may be fp32, which rounds nothing."""
        from halfbyte.model.resolve import Base, fp32_bytes

        merged = str(self._work.folder.merged)
        return 2 * fp32_bytes(Base(merged, merged, None, "", "")) < shutil.disk_usage(merged).free

    def _convert(self, outtype: str, path: Path) -> None:
        merged, name = self._work.folder.merged, str(self._work.run.name)
        arguments = [str(merged), "--outtype", outtype, "--outfile", str(path)]
        convert("convert_hf_to_gguf.py", [*arguments, "--model-name", name], str(merged))

    def _write_modelfile(self, path: Path) -> str:
        renderer = self._work.renderer
        text = modelfile(
            path.name,
            renderer.prompt_text,
            renderer.tokenizer.bos_token,
            [str(renderer.tokenizer.convert_ids_to_tokens(i)) for i in renderer.stop_ids],
            self._work.conversations,
        )
        if text is None:
            return "no Modelfile: Go's templates cannot say what this chat template says"
        write_text(path.parent / MODELFILE, text)
        return MODELFILE


def make_adapter_gguf(work: Work, folder: Path) -> Path:
    """The trained adapter alone as GGUF, for a GGUF of its base.

    Raises:
        ModelError: the converter does not know the architecture or the kind of adapter.
    """
    path = folder / f"{work.run.name}-lora-f32.gguf"
    arguments = [str(work.folder.adapter), "--base", work.base.path, "--outfile", str(path)]
    convert("convert_lora_to_gguf.py", [*arguments, "--outtype", "f32"], str(work.folder.adapter))
    return path
