"""Owns loading for the server: it turns runs, models and files into engines, and proves each before use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from halfbyte.config.section import ComputeDtype, Precision
from halfbyte.data.conversation import Message, Row
from halfbyte.data.render import Renderer
from halfbyte.errors import DataError, ModelError, UserError
from halfbyte.forward.fuse import fuse_frozen
from halfbyte.forward.multi_lora import mix_adapters
from halfbyte.forward.slot_paths import SlotInput
from halfbyte.generate.slot_model import Backend, SlotModel, token_bytes
from halfbyte.host import free_bytes
from halfbyte.llamacpp.gguf_file import read_gguf
from halfbyte.llamacpp.model import GgufModel
from halfbyte.llamacpp.slot_model import LlamaSlotModel, check_prompts
from halfbyte.model.adapter import load_adapter
from halfbyte.model.cpu_speed import ComputeMode, apply_mode, modes_that_fit, time_modes
from halfbyte.model.load import Loaded, load_at_precision
from halfbyte.model.merged import read_merge_report
from halfbyte.model.precision import DTYPES, Compute, choose_compute
from halfbyte.model.resolve import Base, resolve_base
from halfbyte.model.tokenizer import load_tokenizer
from halfbyte.run_dir import RunDir
from halfbyte.serve.chat_codec import ChatCodec
from halfbyte.serve.engine import PREFILL_TOKENS, Engine
from halfbyte.serve.service import ServedModel
from halfbyte.serve.targets import NAME, ServeTarget
from halfbyte.serve.vllm import base_name
from halfbyte.trained.artefact import REPORT, read_artefact
from halfbyte.trained.reference_logprobs import check_reference_logprobs, recorded_prompts
from halfbyte.trained.run import TrainedRun, read_trained_run

MAX_SLOTS = 16  # without --slots
DEFAULT_CONTEXT = 4096
CACHE_FRAC = 0.5  # of the available memory, for keys and values
PROBE = (Message("user", "Hello, what is 2 + 2?"),)


@dataclass(frozen=True)
class Options:
    """How models are loaded and run.

    Attributes:
        slots: answers generated at once per base; None means as many as fit into memory, up to 16.
        max_context: most tokens of a prompt and its answer; None means the model's limit, up to 4096.
        precision: precision of plain models; runs have their own.
        compute_dtype: ``auto`` uses the fastest measured dtype on a CPU, the training's on a GPU.
        packed: whether 4-bit weights stay packed; None means whichever measures faster and fits.
        gpu_layers: layers of GGUF files on the GPU.
        max_waiting: most answers that may wait, per base.
        graphs: on CUDA, record steps of decoding and replay them.
    """

    slots: int | None = None
    max_context: int | None = None
    precision: Precision | None = None
    compute_dtype: ComputeDtype = "auto"
    packed: bool | None = None
    gpu_layers: int = 0
    max_waiting: int = 256
    graphs: bool = True


def open_models(
    targets: list[ServeTarget], options: Options, say: Callable[[str], None]
) -> list[ServedModel]:
    """Load the models to serve, and prove each of them.

    Runs with the same base share it. Each adapter is compared with its reference log-probabilities.

    Raises:
        UserError: a model cannot be loaded or is not the trained one, or two models have the same name.
    """
    # Load in a thread that ends: OpenMP keeps idle workers for each thread that has computed, and once they
    # and the engine thread's workers outnumber the cores, all of them wait in OpenMP's slow mode.
    done: Future[list[ServedModel]] = Future()

    def work() -> None:
        try:
            done.set_result(_open(targets, options, say))
        except BaseException as error:
            done.set_exception(error)

    thread = Thread(target=work, daemon=True)  # so Ctrl-C need not wait for it
    thread.start()
    served = done.result()
    thread.join()
    return served


def _open(
    targets: list[ServeTarget], options: Options, say: Callable[[str], None]
) -> list[ServedModel]:
    served: list[ServedModel] = []
    runs = [target for target in targets if target.is_run]
    for group in _by_base(runs):
        served += _open_runs(group, options, served, say)
    for target in targets:
        if target.is_gguf:
            served.append(_open_gguf(target, options, served, say))
        elif not target.is_run:
            served.append(_open_plain(target, options, served, say))
    names = [one.name for one in served]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{', '.join(twice)}: two models of one name; give NAME=MODEL")
    return served


def _promised_bytes(served: list[ServedModel], device: torch.device) -> int:
    """Return the bytes that the KV caches of loaded engines may still take on a device."""
    backends = {id(one.engine): one.engine.backend for one in served}.values()
    return sum(one.unused_bytes for one in backends if one.device == device)


@dataclass(frozen=True)
class _NamedRun:
    """A trained run and the name under which it is served."""

    name: str
    trained: TrainedRun


def _by_base(targets: list[ServeTarget]) -> list[list[_NamedRun]]:
    """Group runs that can share a base in memory."""
    groups: dict[tuple[Any, ...], list[_NamedRun]] = {}
    for target in targets:
        trained = read_trained_run(Path(target.target))
        settings = trained.run.model
        key = (trained.base.fingerprint, settings.precision, settings.double_quant)
        groups.setdefault(key, []).append(_NamedRun(target.name or str(trained.run.name), trained))
    return list(groups.values())


def _open_runs(
    group: list[_NamedRun], options: Options, others: list[ServedModel], say: Callable[[str], None]
) -> list[ServedModel]:
    first = group[0].trained
    name = base_name(first.base)
    if options.precision is not None:
        raise UserError("--precision has no effect on a run, which has its own; leave it out")
    first.check_stands_alone()
    loaded = first.load_base(_compute(options, first))
    for one in group:
        if not NAME.fullmatch(one.name):
            raise UserError(f"{one.name}: no request can name it; NAME={one.trained.folder.path}")
        adapted = load_adapter(loaded, one.trained.folder.adapter, _inner(one.name))
        loaded.model = adapted
    loaded.model = adapted.get_base_model()
    backend = _slot_model(loaded, options, name, others, say)
    for one in group:
        with_adapter, without = _logits(backend, _inner(one.name)), _logits(backend, None)
        renderer, folder = one.trained.renderer, one.trained.folder.adapter
        distance = check_reference_logprobs(with_adapter, without, renderer, folder)
        say(f"{one.name}: the adapter is live: {distance}")
    backend.forget()
    engine = Engine(backend, options.max_waiting)
    served = [ServedModel(name, engine, ChatCodec(first.renderer, backend.vocab_size))]
    for one in group:
        codec = ChatCodec(one.trained.renderer, backend.vocab_size)
        served.append(ServedModel(one.name, engine, codec, _inner(one.name), name))
    return served


def _inner(name: str) -> str:
    """Return an adapter's name inside the model: PEFT uses it as a module name, which allows no dot."""
    return "run_" + name.replace(".", "_dot_")


def _open_plain(
    target: ServeTarget, options: Options, others: list[ServedModel], say: Callable[[str], None]
) -> ServedModel:
    base = resolve_base(target.target)
    folder = Path(base.path)
    name, merge = target.name or base_name(base), read_merge_report(folder)
    if merge is not None:
        name = target.name or f"{folder.parent.name}-merged"
    renderer = _renderer(base)
    loaded = load_at_precision(base, options.precision, True, options.compute_dtype)
    if merge is not None:
        say(f"{name}: the files are those that the merge measured")
    backend = _slot_model(loaded, options, name, others, say)
    _check_finite(backend, renderer, name)
    return ServedModel(
        name, Engine(backend, options.max_waiting), ChatCodec(renderer, backend.vocab_size)
    )


def _open_gguf(
    target: ServeTarget, options: Options, others: list[ServedModel], say: Callable[[str], None]
) -> ServedModel:
    path = Path(target.target)
    name = target.name or path.stem
    run = path.parent.parent.parent
    probes = [Row("a first prompt", PROBE)]
    if (path.parent / REPORT).is_file() and (run / "run.yaml").is_file():
        report = read_artefact(RunDir(run), path.parent.name)
        kl = report.against_trained.kl_nats_per_token
        say(f"{name}: the file is the one that was proven, KL {kl:.2g} to the trained model")
        trained = read_trained_run(run)
        renderer = trained.renderer
        probes += [row for row in recorded_prompts(trained.folder.adapter) if row.messages]
    else:
        renderer = _renderer(resolve_base(target.target))
    model = GgufModel(path, gpu_layers=options.gpu_layers)
    check_prompts(model, renderer, probes)
    header = read_gguf(path)
    context = min(options.max_context or DEFAULT_CONTEXT, header.context_length)
    slots = options.slots or MAX_SLOTS
    if not options.gpu_layers:  # else llama.cpp itself reports whether its part fits in VRAM
        free = free_bytes(torch.device("cpu")) - _promised_bytes(others, torch.device("cpu"))
        slots = _slots(options, name, context, sum(header.cache_bytes(context)), free)
    backend = LlamaSlotModel(
        model, num_slots=slots, max_context=context, prompt_tokens=PREFILL_TOKENS
    )
    _check_finite(backend, renderer, name)
    say(f"{name}: {model.describe()}, {backend.num_slots} slots of {context} tokens")
    return ServedModel(
        name, Engine(backend, options.max_waiting), ChatCodec(renderer, backend.vocab_size)
    )


def _renderer(base: Base) -> Renderer:
    try:
        return Renderer(load_tokenizer(base))
    except DataError as error:
        raise ModelError(f"{base.name}: has no usable chat template: {error}") from error


def _compute(options: Options, trained: TrainedRun) -> Compute:
    if options.compute_dtype == "auto":
        return trained.trained_compute()
    return choose_compute(options.compute_dtype)


def _slot_model(
    loaded: Loaded,
    options: Options,
    name: str,
    others: list[ServedModel],
    say: Callable[[str], None],
) -> SlotModel:
    """Build a backend for the model with as many slots as fit, computing in its fastest mode."""
    model: Any = loaded.model
    device = loaded.compute.device
    promised = _promised_bytes(others, device)
    mix_adapters(model)
    fuse_frozen(model, device)
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
        graphs=options.graphs,
    )
    say(f"{name}: {mode.name} on {device}, {slots} slots of {context} tokens")
    return backend


def _slots(options: Options, name: str, context: int, slot_bytes: int, free: int) -> int:
    """Return the number of slots whose KV cache fits into half of the free memory.

    Raises:
        ModelError: the slots set by --slots do not fit, or not even a single one does.
    """
    available = max(0, int(free * CACHE_FRAC))
    slots = options.slots or min(MAX_SLOTS, available // slot_bytes)
    if slots * slot_bytes > available or not slots:
        raise ModelError(
            f"{name}: keys and values of {max(1, slots)} x {context} tokens may take"
            f" {max(1, slots) * slot_bytes / 1e9:.1f} GB, and {available / 1e9:.1f} GB are available. Use fewer"
            " --slots or a shorter --max-context"
        )
    return slots


def _mode(loaded: Loaded, options: Options, free: int, say: Callable[[str], None]) -> ComputeMode:
    dtypes = [torch.float32, torch.bfloat16]
    if loaded.precision in DTYPES:
        # Plain weights were loaded in the compute dtype.
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
    slots = options.slots or MAX_SLOTS
    seconds = time_modes(loaded.model, fits, slots)
    for mode, (one, many) in seconds.items():
        say(
            f"  {mode.name}: {1e3 * one:.0f} ms for one token, {1e3 * many:.0f} ms for {slots} at once"
        )
    for mode in too_large:
        say(f"  {mode.name}: does not fit into memory")
    return min(seconds, key=lambda mode: sum(seconds[mode]))


def _logits(backend: Backend, adapter: str | None) -> Callable[[list[int]], torch.Tensor]:
    """Return a function from ids to logits that computes as in serving: a prefill, then the last token."""

    def logits(ids: list[int]) -> torch.Tensor:
        lead, last = ids[:-1], SlotInput(0, adapter, ids[-1:], len(ids) - 1)
        if lead:
            backend.run([SlotInput(0, adapter, lead, 0)])
        beside = [SlotInput(1, None, ids, 0)] if backend.num_slots > 1 else []
        return backend.run([last, *beside])[0]

    return logits


def _check_finite(backend: Backend, renderer: Renderer, name: str) -> None:
    """Check that a first answer is finite, which reveals NaN in the weights."""
    ids = renderer.encode_prompt(PROBE)
    backend.keep(0, 0)
    if not torch.isfinite(_logits(backend, None)(ids)).all():
        raise ModelError(
            f"{name}: answers NaN or infinity to a first prompt; its weights are damaged"
        )
    backend.forget()
