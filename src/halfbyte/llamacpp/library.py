"""Owns llama.cpp's C library: the functions that halfbyte calls, in any build of it since mid 2025.

Parameter structs differ between builds, and a new field moves all fields behind it. So they are opaque here:
the library fills in its own defaults and gets them back, and only fields at the beginning, where they have
been since 2024, are changed, after a check of their defaults.
Source: include/llama.h of llama.cpp v0.5.0 and b11739.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

from halfbyte.errors import ModelError

# Positions of the fields that are set, in 32-bit words, and the defaults that known builds have there.
CONTEXT_FIELDS = {
    "n_ctx": (0, {512}),
    "n_batch": (1, {2048}),
    "n_ubatch": (2, {512}),
    "n_seq_max": (3, {1}),
}
GPU_LAYERS = (4, {-1, 0, 999})
QUANTISE_FIELDS = {"nthread": (0, {0}), "ftype": (1, {7, 9, 15})}
FTYPES = {  # enum llama_ftype
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_m": 12,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
}
KEPT_LOG_PIECES = 200
DEBUG = 1  # enum ggml_log_level


class Opaque(ctypes.Structure):
    """Holds a parameter struct of unknown layout, larger than that of any build."""

    _fields_ = [("words", ctypes.c_int64 * 64)]

    def put(self, name: str, index: int, defaults: set[int], value: int) -> None:
        """Set the 32-bit word at ``index``.

        Raises:
            ModelError: the word there is none of the known defaults, so this build has another layout.
        """
        words = ctypes.cast(ctypes.pointer(self), POINTER(c_int32))
        if words[index] not in defaults:
            raise ModelError(
                f"llama.cpp: {name} is {words[index]} by default, but {sorted(defaults)} is expected: this"
                " build has another layout. Use another build (docs/export.md says where to get one)"
            )
        words[index] = value


class LlamaBatch(ctypes.Structure):
    """Mirrors ``llama_batch``: the tokens of one call, their positions, and which of them give logits."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LOG, c_void_p]),
    "llama_supports_gpu_offload": (c_bool, []),
    "llama_model_default_params": (Opaque, []),
    "llama_context_default_params": (Opaque, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, Opaque]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_init_from_model": (c_void_p, [c_void_p, Opaque]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_batch_init": (LlamaBatch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [LlamaBatch]),
    "llama_decode": (c_int32, [c_void_p, LlamaBatch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_get_text": (c_char_p, [c_void_p, c_int32]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (
        c_int32,
        [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
    ),
    "llama_detokenize": (
        c_int32,
        [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool],
    ),
    "llama_model_desc": (c_int32, [c_void_p, c_char_p, c_size_t]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
}
QUANTISE_FUNCTIONS = ("llama_model_quantize_default_params", "llama_model_quantize")
# Some builds lack these, or have them under another name.
OPTIONAL_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_set_adapters_lora": (
        c_int32,
        [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)],
    ),
    "llama_set_adapter_lora": (c_int32, [c_void_p, c_void_p, c_float]),
    "llama_model_quantize_default_params": (Opaque, []),
    "llama_model_quantize": (c_uint32, [c_char_p, c_char_p, POINTER(Opaque)]),
}


class Library:
    """Wraps a loaded libllama: functions by their C names, the log kept in ``lines`` instead of printed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []
        handles = _open(path)
        self._dll = handles[-1]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llama.cpp")
        for name, (result, arguments) in (SIGNATURES | OPTIONAL_SIGNATURES).items():
            if hasattr(self._dll, name):
                function = getattr(self._dll, name)
                function.restype, function.argtypes = result, arguments
        self._log = LOG(self._record)  # kept alive here: the library holds only the pointer
        self._dll.llama_log_set(self._log, None)
        # Builds with one file for each kind of CPU look for them in the library's folder.
        load_backends = _find_function(handles, "ggml_backend_load_all_from_path")
        if load_backends is not None:
            load_backends.restype, load_backends.argtypes = None, [c_char_p]
            load_backends(str(path.parent).encode())
        self._dll.llama_backend_init()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(self._dll, name)  # type: ignore[no-any-return]

    def llama_decode(self, context: int, batch: LlamaBatch) -> int:
        """Call the C function on a thread where nothing but this library computes.

        The configuration of AMX tiles (Intel SDM vol. 1, chapter 18) belongs to a thread, and ggml loads it
        once in each. Where PyTorch computes in bf16 on that thread, oneDNN releases or replaces it, and the
        next decode dies of an illegal instruction.
        """
        future = self._thread.submit(self._dll.llama_decode, context, batch)
        try:
            return int(future.result())
        finally:
            wait([future])  # after Ctrl-C too: the caller frees what it reads

    def has(self, name: str) -> bool:
        """Return whether this build has a function."""
        return hasattr(self._dll, name)

    def pop_error(self) -> str:
        """Return the log's first line about an error, else its first line, and clear the log."""
        lines = [line for line in "".join(self.lines).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
        self.lines.clear()
        return (errors or lines or ["it gives no reason"])[0].strip()

    def _record(self, level: int, text: bytes, _data: Any) -> None:
        if level == DEBUG:
            return
        self.lines.append(text.decode("utf-8", "replace"))
        del self.lines[:-KEPT_LOG_PIECES]


@functools.cache
def library(path: Path) -> Library:
    """Load the library at ``path`` once: a second instance would take over the log of the first."""
    return Library(path)


def has_functions(path: Path, names: Iterable[str]) -> bool:
    """Return whether a library can be loaded here and exports all of these functions."""
    try:
        return all(hasattr(_open(path)[-1], name) for name in names)
    except OSError:
        return False


def quantise_with(path: Path, source: Path, target: Path, ftype: str, num_threads: int) -> None:
    """Quantise a GGUF file with the library at ``path``.

    Raises:
        ModelError: the library rejects the file, or has another layout.
    """
    lib = library(path)
    settings: Opaque = lib.llama_model_quantize_default_params()
    values = {"nthread": num_threads, "ftype": FTYPES[ftype]}
    for field, (index, defaults) in QUANTISE_FIELDS.items():
        settings.put(field, index, defaults, values[field])
    code = lib.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(settings)
    )
    if code:
        raise ModelError(f"llama.cpp could not quantise {source} to {ftype}: {lib.pop_error()}")


def _open(path: Path) -> list[ctypes.CDLL]:
    """Open the library after the ggml ones beside it, which its own search path may not cover."""
    dependencies = [*path.parent.glob("libggml-base*"), *path.parent.glob("libggml.*")]
    return [ctypes.CDLL(str(part)) for part in [*dependencies, path]]


def _find_function(handles: list[ctypes.CDLL], name: str) -> Any:
    return next((getattr(handle, name) for handle in handles if hasattr(handle, name)), None)
