"""Owns getting ready: runs, models and files into engines, each proven before a request reaches it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from halfbyte.config import Run, read_run_folder
from halfbyte.config.section import ComputeDtype, Precision
from halfbyte.data.render import Renderer
from halfbyte.data.rows import Message
from halfbyte.errors import DataError, ModelError, RunError, UserError
from halfbyte.forward.multi_lora import mix_adapters
from halfbyte.forward.slot_attention import SlotInput
from halfbyte.generate.slot_model import Backend, SlotModel, token_bytes
from halfbyte.host import free_bytes
from halfbyte.llamacpp.gguf_file import read_gguf
from halfbyte.llamacpp.model import GgufModel
from halfbyte.llamacpp.slot_model import LlamaSlotModel
from halfbyte.model.adapter import load_adapter
from halfbyte.model.cpu_speed import ComputeMode, apply_mode, modes_that_fit, time_modes
from halfbyte.model.load import Loaded, load_at_precision, load_base, load_tokenizer
from halfbyte.model.merged import MergeReport, read_merge_report
from halfbyte.model.precision import DTYPES, choose_compute
from halfbyte.model.resolve import Base, resolve_base
from halfbyte.run_dir import RunDir, file_sha256
from halfbyte.serve.chat_codec import Words
from halfbyte.serve.engine import PROMPT_TOKENS, Engine
from halfbyte.serve.service import Served
from halfbyte.serve.targets import NAME, ServeTarget
from halfbyte.serve.vllm import base_name
from halfbyte.trained.artefact import REPORT, read_artefact
from halfbyte.trained.reference_logprobs import check_reference_logprobs
from halfbyte.trained.run import same_compute, saved_renderer, trained_base

MAX_SLOTS = 16  # where nothing else is asked for
DEFAULT_CONTEXT = 4096
CACHE_FRAC = 0.5  # of the available memory, for keys and values
KERNELS = 128  # that oneDNN keeps
PROBE = (Message("user", "Hello, what is 2 + 2?"),)


@dataclass(frozen=True)
class Options:
    """How models are loaded and computed.

    Attributes:
        slots: answers made at once, for each base; None: as many as memory has room for, up to 16.
        max_context: tokens of a prompt and its answer; None: the model's own, up to 4096.
        precision: of plain models; runs know theirs.
        compute_dtype: ``auto`` takes the fastest by measurement on a CPU, the training's on a GPU.
        packed: whether 4-bit weights stay so; None: by measurement where memory has room.
        gpu_layers: of GGUF files.
        max_waiting: answers that may wait, for each base.
    """

    slots: int | None = None
    max_context: int | None = None
    precision: Precision | None = None
    compute_dtype: ComputeDtype = "auto"
    packed: bool | None = None
    gpu_layers: int = 0
    max_waiting: int = 256


def open_models(
    asked: list[ServeTarget], options: Options, say: Callable[[str], None]
) -> list[Served]:
    """Load what is asked for and prove it.

    Runs on one base share it. Each adapter is compared with what it answered when it was trained.

    Raises:
        UserError: something cannot be loaded, is not what was trained, or two have one name.
    """
    # PyTorch's oneDNN keeps what it makes for each shape of a product in bf16, 1,024 of them and 0.3 MB each,
    # and passes have hundreds of lengths. Those of single tokens fit in this; one anew takes half a millisecond.
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))
    # In a thread that ends: OpenMP keeps idle workers for each thread that has computed, and where they
    # and those of an engine's thread are more than cores, all of them wait in the slow mode.
    done: Future[list[Served]] = Future()

    def work() -> None:
        try:
            done.set_result(_open(asked, options, say))
        except BaseException as error:
            done.set_exception(error)

    thread = Thread(target=work, daemon=True)  # Ctrl-C need not wait for it
    thread.start()
    served = done.result()
    thread.join()
    return served


def _open(asked: list[ServeTarget], options: Options, say: Callable[[str], None]) -> list[Served]:
    served: list[Served] = []
    runs = [one for one in asked if one.is_run]
    for group in _by_base(runs):
        served += _open_runs(group, options, served, say)
    for one in asked:
        if one.is_gguf:
            served.append(_open_gguf(one, options, served, say))
        elif not one.is_run:
            served.append(_open_plain(one, options, served, say))
    names = [one.name for one in served]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{', '.join(twice)}: two models of one name; give NAME=MODEL")
    return served


def _promised_bytes(served: list[Served], device: torch.device) -> int:
    """What the caches of engines that are ready may yet take on a device."""
    backends = {id(one.engine): one.engine.backend for one in served}.values()
    return sum(one.unused_bytes for one in backends if one.device == device)


@dataclass(frozen=True)
class _OpenRun:
    """A run that is to be served."""

    name: str
    folder: RunDir
    run: Run
    base: Base


def _by_base(runs: list[ServeTarget]) -> list[list[_OpenRun]]:
    """Runs that can share a base in memory stand together."""
    groups: dict[tuple[Any, ...], list[_OpenRun]] = {}
    for one in runs:
        folder, run = RunDir(Path(one.target).resolve()), read_run_folder(Path(one.target))
        base = trained_base(folder, run)
        key = (base.fingerprint, run.model.precision, run.model.double_quant)
        groups.setdefault(key, []).append(_OpenRun(one.name or str(run.name), folder, run, base))
    return list(groups.values())


def _open_runs(
    group: list[_OpenRun], options: Options, others: list[Served], say: Callable[[str], None]
) -> list[Served]:
    first = group[0]
    name = base_name(first.base)
    if options.precision is not None:
        raise UserError("--precision has no effect on a run, which says it itself; leave it out")
    loaded = load_base(first.base, first.run.model, _compute(options, first.folder))
    for one in group:
        if not NAME.fullmatch(one.name):
            raise UserError(
                f"{one.name}: cannot be asked for by this name; give NAME={one.folder.path}"
            )
        adapted = load_adapter(loaded, one.folder.adapter, _inner(one.name))
        loaded.model = adapted
    loaded.model = adapted.get_base_model()
    renderers = [saved_renderer(one.folder, one.run, one.base) for one in group]
    backend = _lanes(loaded, options, name, others, say)
    for one, renderer in zip(group, renderers, strict=True):
        told = check_reference_logprobs(
            _logits(backend, _inner(one.name)), _logits(backend, None), renderer, one.folder.adapter
        )
        say(f"{one.name}: the adapter is live: {told}")
    backend.forget()
    engine = Engine(backend, options.max_waiting)
    served = [Served(name, engine, Words(renderers[0], backend.vocab_size))]
    for one, renderer in zip(group, renderers, strict=True):
        words = Words(renderer, backend.vocab_size)
        served.append(Served(one.name, engine, words, _inner(one.name), name))
    return served


def _inner(name: str) -> str:
    """PEFT makes a module of each adapter's name, which may hold no dot."""
    return "run_" + name.replace(".", "_dot_")


def _open_plain(
    one: ServeTarget, options: Options, others: list[Served], say: Callable[[str], None]
) -> Served:
    base = resolve_base(one.target)
    folder = Path(base.path)
    name, merge = one.name or base_name(base), read_merge_report(folder)
    if merge is not None:
        _check_merged(folder, merge)
        name = one.name or f"{folder.parent.name}-merged"
        say(f"{name}: the files are those that the merge measured")
    renderer = _renderer(base)
    loaded = load_at_precision(base, options.precision, True, options.compute_dtype)
    backend = _lanes(loaded, options, name, others, say)
    _check_finite(backend, renderer, name)
    return Served(name, Engine(backend, options.max_waiting), Words(renderer, backend.vocab_size))


def _open_gguf(
    one: ServeTarget, options: Options, others: list[Served], say: Callable[[str], None]
) -> Served:
    path = Path(one.target)
    name = one.name or path.stem
    run = path.parent.parent.parent
    if (path.parent / REPORT).is_file() and (run / "run.yaml").is_file():
        report = read_artefact(RunDir(run), path.parent.name)
        told = report["against_trained"]["kl_nats_per_token"]
        say(f"{name}: the file is the one that was proven, KL {told:.2g} to the trained model")
        folder, settings = RunDir(run), read_run_folder(run)
        renderer = saved_renderer(folder, settings, trained_base(folder, settings))
    else:
        renderer = _renderer(resolve_base(one.target))
    model = GgufModel(path, gpu_layers=options.gpu_layers)
    _, theirs = model.prompt(PROBE)
    ours = renderer.encode_prompt(PROBE)
    if ours != theirs:
        raise ModelError(
            f"{path}: the template or tokenizer in the file is not the one that transformers reads: a probe"
            f" has {len(theirs)} tokens in llama.cpp and {len(ours)} there"
        )
    header = read_gguf(path)
    context = min(options.max_context or DEFAULT_CONTEXT, header.context_length)
    slots = options.slots or MAX_SLOTS
    if not options.gpu_layers:  # else llama.cpp says itself whether its part fits in VRAM
        free = free_bytes(torch.device("cpu")) - _promised_bytes(others, torch.device("cpu"))
        slots = _slots(options, name, context, sum(header.cache_bytes(context)), free)
    backend = LlamaSlotModel(
        model, num_slots=slots, max_context=context, prompt_tokens=PROMPT_TOKENS
    )
    _check_finite(backend, renderer, name)
    say(f"{name}: {model.describe()}, {backend.num_slots} slots of {context} tokens")
    return Served(name, Engine(backend, options.max_waiting), Words(renderer, backend.vocab_size))


def _renderer(base: Base) -> Renderer:
    try:
        return Renderer(load_tokenizer(base))
    except DataError as error:
        raise ModelError(f"{base.name}: cannot be talked to: {error}") from error


def _compute(options: Options, folder: RunDir) -> Any:
    if options.compute_dtype == "auto":
        return same_compute(folder)
    return choose_compute(options.compute_dtype)


def _lanes(
    loaded: Loaded, options: Options, name: str, others: list[Served], say: Callable[[str], None]
) -> SlotModel:
    """The model as a backend, with as many slots as there is room for, computing the fastest way."""
    model: Any = loaded.model
    device = loaded.compute.device
    promised = _promised_bytes(others, device)
    mix_adapters(model)
    mode = ComputeMode(loaded.compute.dtype, True)
    if device.type == "cpu":
        mode = _mode(loaded, options, free_bytes(device) - promised, say)
        apply_mode(model, mode)
    elif options.packed is False:
        raise UserError("--weights unpacked is for a CPU: on a GPU 4 bits are there to save memory")
    text = model.config.get_text_config()
    context = options.max_context or DEFAULT_CONTEXT
    context = min(context, int(getattr(text, "max_position_embeddings", context)))
    slot_bytes = context * token_bytes(text, mode.dtype)
    slots = _slots(options, name, context, slot_bytes, free_bytes(device) - promised)
    backend = SlotModel(
        model,
        num_slots=slots,
        max_context=context,
        dtype=mode.dtype,
        cache_bytes=slots * slot_bytes,
    )
    say(f"{name}: {mode.name} on {device}, {slots} slots of {context} tokens")
    return backend


def _slots(options: Options, name: str, context: int, slot_bytes: int, free: int) -> int:
    """Answers at once for which half of the free memory holds keys and values.

    Raises:
        ModelError: there is not room for as many as are asked for, or for one.
    """
    available = max(0, int(free * CACHE_FRAC))
    slots = options.slots or min(MAX_SLOTS, available // slot_bytes)
    if slots * slot_bytes > available or not slots:
        raise ModelError(
            f"{name}: keys and values of {max(1, slots)} x {context} tokens may take"
            f" {max(1, slots) * slot_bytes / 1e9:.1f} GB, and {available / 1e9:.1f} GB are to be had. Use fewer"
            " --slots or a shorter --max-context"
        )
    return slots


def _mode(loaded: Loaded, options: Options, free: int, say: Callable[[str], None]) -> ComputeMode:
    dtypes = [torch.float32, torch.bfloat16]
    if loaded.precision in DTYPES:
        # Plain weights were loaded in the dtype that computes.
        dtypes = [loaded.compute.dtype]
    elif options.compute_dtype != "auto":
        dtypes = [DTYPES[options.compute_dtype]]
    packings = [True, False] if options.packed is None else [options.packed]
    fits, too_large = modes_that_fit(loaded.model, dtypes, packings, free)
    if not fits:
        raise ModelError(
            f"{loaded.base.name}: {too_large[0].name} does not fit into memory; use --weights packed"
        )
    if len(fits) == 1:
        return fits[0]
    lanes = options.slots or MAX_SLOTS
    found = time_modes(loaded.model, fits, lanes)
    for mode, (one, many) in found.items():
        say(
            f"  {mode.name}: {1e3 * one:.0f} ms for one token, {1e3 * many:.0f} ms for {lanes} at once"
        )
    for mode in too_large:
        say(f"  {mode.name}: does not fit into memory")
    return min(found, key=lambda mode: sum(found[mode]))


def _logits(backend: Backend, adapter: str | None) -> Callable[[list[int]], torch.Tensor]:
    """Logits after ids, as serving computes them: the last token on its own, beside another request."""

    def logits(ids: list[int]) -> torch.Tensor:
        lead, last = ids[:-1], SlotInput(0, adapter, ids[-1:], len(ids) - 1)
        if lead:
            backend.run([SlotInput(0, adapter, lead, 0)])
        beside = [SlotInput(1, None, ids, 0)] if backend.num_slots > 1 else []
        return backend.run([last, *beside])[0]

    return logits


def _check_finite(backend: Backend, renderer: Renderer, name: str) -> None:
    """A first answer: weights that hold NaN show here."""
    ids = renderer.encode_prompt(PROBE)
    backend.keep(0, 0)
    if not torch.isfinite(_logits(backend, None)(ids)).all():
        raise ModelError(
            f"{name}: answers NaN or infinity to a first prompt; its weights are damaged"
        )
    backend.forget()


def _check_merged(folder: Path, merge: MergeReport) -> None:
    for file, sha256 in merge.sha256.items():
        if not (folder / file).is_file() or file_sha256(folder / file) != sha256:
            raise RunError(
                f"{folder / file}: is not the file that the merge measured (missing or changed). Merge"
                f" again: python train/merge.py {folder.parent}"
            )
