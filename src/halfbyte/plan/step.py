"""Owns the training step without data: a few fake layers run forward and backward, and stand for all.

The step is the real one: transformers' model, bitsandbytes' layers, PEFT's adapter, our loss, run by
autograd on fake tensors while every byte is counted. Nothing is estimated from a formula that could
fall behind the libraries.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from halfbyte.config.schema import Adapter, Model, Speed
from halfbyte.data.prefix_tree import one_stem
from halfbyte.errors import UntraceableError
from halfbyte.forward.fused_layers import fuse
from halfbyte.forward.loss import head_losses, tile_starts
from halfbyte.forward.packed import pick, tree_inputs, tree_refusal
from halfbyte.model.adapter import attach_adapter, trainable_parameters
from halfbyte.model.load import Loaded
from halfbyte.model.precision import DTYPES, Compute, keep_residual
from halfbyte.model.resolve import Base
from halfbyte.model.skeleton import build_for_step, check_attention, layer_list, quantise
from halfbyte.plan.fake import (
    ATTENTION,
    MATH_ATTENTION,
    FewParts,
    materialise,
    register_attention,
)
from halfbyte.plan.layer_cut import Cut, cut, keep_layers, layer_kinds
from halfbyte.plan.live import LiveBytes, Peak
from halfbyte.plan.shape import StepShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORWARD, HEAD, BACKWARD, BACKWARD_END = PHASES = (
    "forward pass",
    "loss head",
    "start of the backward pass",
    "end of the backward pass",
)
EVALUATION = "evaluation"
# What models raise that ask for data, for a mask, or for an attention of their own; NotImplementedError
# is a RuntimeError.
UNTRACEABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
Batch = tuple[dict[str, Any], torch.Tensor, torch.Tensor]
ACTIVATIONS, LOGITS, WORKING, GRADIENTS = "activations", "logits", "working_set", "gradients"


class TracedStep:
    """A model with its adapter, of fake tensors, that can be traced at any shape.

    Args:
        config: of the model; its language part is what is trained.
        model: precision and attention.
        adapter: where LoRA sits.
        speed: what is shared, left out or fused.
        dtype: of the matrix products.
        device_type: ``cuda`` or ``cpu``.
        flash: whether that device has kernels that never hold all attention scores.

    Raises:
        ModelError: the model or its adapter cannot be built, or its step cannot be traced.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        model: Model,
        adapter: Adapter,
        speed: Speed,
        dtype: torch.dtype,
        device_type: str,
        flash: bool,
    ) -> None:
        register_attention()
        text = config.get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        groups = getattr(text, "num_key_value_heads", None) not in (None, heads)
        # On CUDA grouped heads go to flash kernels, which need 16 bits and Ampere, or to plain maths.
        slow = device_type == "cuda" and groups and not (flash and dtype != torch.float32)
        attention = MATH_ATTENTION if slow else ATTENTION
        self.model = build_for_step(
            config, dtype, "eager" if model.attention == "eager" else attention
        )
        check_attention(self.model, model.attention)
        self.speed = speed
        self.shares, self.padded = speed.layout(tree_refusal(self.model, model.attention))
        self.kinds = layer_kinds(self.model)
        self.cut: Cut = cut(self.kinds)
        self.dtype, self.device_type = dtype, device_type
        types = getattr(self.model.config.get_text_config(), "layer_types", None)
        self.types: list[str] | None = list(types) if types else None
        whole = layer_list(self.model)
        self.layers = {i: whole[i] for i in self.cut.layers}
        try:
            self._keep(self.cut.layers)
        except UNTRACEABLE as error:
            raise UntraceableError(
                f"{type(self.model).__name__}: its layers cannot be cut: {error}"
            ) from error
        quantise(self.model, model.precision, model.double_quant, dtype)
        loaded = Loaded(
            self.model,
            Base("plan", "", None, "", ""),
            model.precision,
            Compute(torch.device("cpu"), dtype, ""),
        )
        # PiSSA, OLoRA and LoftQ start from other values in the same places.
        with torch.device("meta"):
            plain = adapter.model_copy(update={"init": "default"})
            self.adapted = attach_adapter(loaded, plain, 0, Path())
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            self.fixed = materialise(self.adapted)
            if dtype == torch.float16 and model.precision not in DTYPES:
                keep_residual(self.model)
            fuse(self.adapted, speed, probe=False)
        self._traced: dict[tuple[Any, ...], LiveBytes] = {}
        self.num_trainable = self.over_trainable(lambda parameter: parameter.numel())

    def over_trainable(self, measure: Callable[[torch.Tensor], int]) -> int:
        """The sum of a measure over the trainable parameters of the whole model."""

        def measured(layers: tuple[int, ...]) -> Counter[str]:
            self._keep(layers)
            return Counter(sum=sum(map(measure, trainable_parameters(self.adapted).values())))

        return self._whole({layers: measured(layers) for layers in self._variants()})["sum"]

    def peaks(self, shape: StepShape) -> dict[str, Peak]:
        """The most live bytes of each phase, weights, adapter and optimizer left out."""
        found = self._traces(shape, self._step)
        return {phase: self._whole_peak(phase, found) for phase in PHASES}

    def evaluation(self, shape: StepShape) -> Peak:
        """The most live bytes while the same rows are scored, without gradients."""
        return self._whole_peak(EVALUATION, self._traces(shape, self._evaluate))

    def most(self, shape: StepShape) -> Counter[str]:
        """The most bytes of each term by itself, whenever in the step that is."""
        found = self._traces(shape, self._step)
        return self._whole({layers: live.most for layers, live in found.items()})

    def kept(self, shape: StepShape) -> int:
        """Bytes that the forward pass has left behind when the backward pass begins."""
        found = self._traces(shape, self._step)
        kept = {layers: Counter(kept=live.kept_bytes) for layers, live in found.items()}
        return self._whole(kept)["kept"]

    def kept_per_layer(self, shape: StepShape) -> list[tuple[str, int, int]]:
        """For each kind of layer: its name, how many there are, bytes one keeps for its backward."""
        found = self.kept_by_kind(shape)
        return [(str(kind[0]), self.kinds.count(kind), kept) for kind, kept in found.items()]

    def kept_by_kind(self, shape: StepShape) -> dict[tuple[Any, ...], int]:
        """Bytes that a layer of each kind keeps, where there is more than one of a kind."""
        base = self._trace(self.cut.base, shape, self._step).kept_bytes
        found = {}
        for kind in dict.fromkeys(self.kinds):
            spare = [layer for layer, _ in self.cut.more if self.kinds[layer] == kind]
            if spare:
                layers = tuple(sorted((*self.cut.base, spare[0])))
                found[kind] = self._trace(layers, shape, self._step).kept_bytes - base
        return found

    def cache(self, context: int) -> tuple[int, int]:
        """Bytes that one row's keys and values take, and the most that its prefill takes beside them."""
        found = {layers: self._prefill(layers, context) for layers in self._variants()}
        total = self._whole(found)
        return total["cache"], total["peak"] - total["cache"]

    def _prefill(self, layers: tuple[int, ...], context: int) -> Counter[str]:
        self._keep(layers)
        self.adapted.eval()
        with self._counting("prefill") as live, torch.no_grad():
            live.enter(EVALUATION, WORKING)
            ids = torch.zeros((1, context), dtype=torch.long)
            with self._autocast():
                out = self.model(ids, use_cache=True, logits_to_keep=1)
            # A sliding window keeps a slice; its storage goes with the next token.
            cache = sum(
                tensor.nbytes
                for layer in out.past_key_values.layers
                for tensor in vars(layer).values()
                if isinstance(tensor, torch.Tensor)
            )
            peak = live.peaks[EVALUATION].total_bytes
        return Counter(cache=cache, peak=peak)

    def _variants(self) -> list[tuple[int, ...]]:
        base = self.cut.base
        return [base, *(tuple(sorted((*base, layer))) for layer, _ in self.cut.more)]

    def _whole(self, found: dict[tuple[int, ...], Counter[str]]) -> Counter[str]:
        """A quantity of the whole model from that of the base layers and of each layer more."""
        base, *more = self._variants()
        total = Counter(found[base])
        for layers, (_, times) in zip(more, self.cut.more, strict=True):
            for term in set(found[layers]) | set(found[base]):
                total[term] += times * (found[layers][term] - found[base][term])
        return total

    def _whole_peak(self, phase: str, found: dict[tuple[int, ...], LiveBytes]) -> Peak:
        terms = self._whole({layers: live.peaks[phase].terms for layers, live in found.items()})
        return Peak(sum(terms.values()), terms)

    def _keep(self, layers: tuple[int, ...]) -> None:
        keep_layers(self.model, {i: self.layers[i] for i in layers}, self.types)

    def _traces(
        self, shape: StepShape, work: Callable[[LiveBytes, StepShape], None]
    ) -> dict[tuple[int, ...], LiveBytes]:
        return {layers: self._trace(layers, shape, work) for layers in self._variants()}

    def _trace(
        self,
        layers: tuple[int, ...],
        shape: StepShape,
        work: Callable[[LiveBytes, StepShape], None],
    ) -> LiveBytes:
        """What is counted while these layers do this work; the same question is traced once."""
        key = (layers, shape, work.__name__)
        if key not in self._traced:
            self._traced[key] = self._count(layers, shape, work)
        return self._traced[key]

    def _count(
        self,
        layers: tuple[int, ...],
        shape: StepShape,
        work: Callable[[LiveBytes, StepShape], None],
    ) -> LiveBytes:
        self._keep(layers)
        if shape.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            # So that TRL's own call leaves one hook, which goes away again with the last line.
            self.model.disable_input_require_grads()
            self.model.enable_input_require_grads()
        try:
            _ = self.tiled  # asked for before anything is counted: it runs the model too
            with self._counting("training step") as live:
                work(live, shape)
        finally:
            if shape.checkpointing:
                self.model.gradient_checkpointing_disable()
                self.model.disable_input_require_grads()
        return live

    @contextlib.contextmanager
    def _counting(self, what: str) -> Iterator[LiveBytes]:
        """Count what is born on fake tensors from here on, weights and adapter left out.

        Raises:
            UntraceableError: the model asks for what only data can tell.
        """
        live = LiveBytes()
        try:
            with self.fake, live:
                for tensor in self.fixed:
                    live.ignore(tensor)
                yield live
        except UNTRACEABLE as error:
            raise UntraceableError(
                f"the {what} of {type(self.model).__name__} cannot be traced: {error}"
            ) from error

    def _step(self, live: LiveBytes, shape: StepShape) -> None:
        parameters = list(trainable_parameters(self.adapted).values())
        hooks = _gradient_hooks(live, parameters, list(self.layers[0].parameters()))
        self.adapted.train()
        if shape.accumulates:
            live.enter(FORWARD, GRADIENTS)
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
        live.enter(FORWARD, ACTIVATIONS)
        batch = self._batch(shape)
        with self._autocast():
            total = self._loss(live, HEAD, batch)
        live.kept_bytes = live.total_bytes - live.now[GRADIENTS]
        live.enter(BACKWARD, WORKING)
        torch.autograd.backward(total)
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None

    @torch.no_grad()
    def _evaluate(self, live: LiveBytes, shape: StepShape) -> None:
        self.adapted.eval()
        live.enter(EVALUATION, WORKING)
        batch = self._batch(shape)
        with self._autocast():
            self._loss(live, EVALUATION, batch)

    def _batch(self, shape: StepShape) -> Batch:
        """Arguments of the pass, and the places (N,) and ids (N,) of its predictions."""
        places = torch.zeros(shape.num_labels, dtype=torch.long)
        if self.padded:
            ids = torch.zeros((len(shape.lengths), shape.lengths[0]), dtype=torch.long)
            return {"input_ids": ids}, places, torch.zeros_like(places)
        nodes = shape.nodes or one_stem(shape.lengths, shape.shared)
        ids = torch.zeros((1, max(node.end for node in nodes)), dtype=torch.long)
        tree = FewParts(nodes, torch.device("cpu"), gathered=self.device_type == "cuda")
        return tree_inputs(ids, torch.zeros_like(ids), tree), places, torch.zeros_like(places)

    def _loss(self, live: LiveBytes, phase: str, batch: Batch) -> torch.Tensor:
        """The summed loss, as ``add_token_loss`` computes it; the head's part belongs to ``phase``."""
        inputs, sources, targets = batch
        term = LOGITS if phase == HEAD else WORKING
        if not (self.tiled and self.speed.labelled_head):
            hook = self.model.base_model.register_forward_hook(lambda *_: live.enter(phase, term))
            logits = pick(self.model(**inputs, use_cache=False).logits, sources)
            hook.remove()
            live.enter(phase, term)  # where the model goes round its own base
            return nn.functional.cross_entropy(logits.float(), targets, reduction="none").sum()
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        live.enter(phase, term)
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        states = pick(hidden, sources)
        # All tiles are alike, and the second is born when the first has not gone yet.
        starts = tile_starts(len(targets))[:2]
        return head_losses(self.model, states, targets, cap, starts).sum()

    @functools.cached_property
    def tiled(self) -> bool:
        """Whether the logits are the head's product of the last hidden states, at most capped.

        Where they are not (Granite and Cohere scale them), ``add_token_loss`` takes the model's own.
        """
        head: Any = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
            return False
        seen: dict[str, Any] = {}

        def storage(tensor: torch.Tensor) -> int:
            address: int = tensor.untyped_storage()._cdata
            return address

        def base_hook(_: Any, __: Any, out: Any) -> None:
            seen["hidden"] = getattr(out, "last_hidden_state", None)

        def before_head(_: Any, inputs: Any) -> None:
            seen["input"] = inputs[0]

        def head_hook(_: Any, __: Any, out: Any) -> None:
            seen["product"] = out

        hooks = [
            self.model.base_model.register_forward_hook(base_hook),
            # First of all, so that a hook that casts the input comes after it.
            head.register_forward_pre_hook(before_head, prepend=True),
            head.register_forward_hook(head_hook),
        ]
        with self._counting("training step") as live, torch.no_grad():
            live.enter(EVALUATION, WORKING)
            logits = self.model(torch.zeros((1, 8), dtype=torch.long), use_cache=False).logits
        for hook in hooks:
            hook.remove()
        capped = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if seen.get("hidden") is None or "input" not in seen:
            return False  # the model goes round its own base
        same_input = storage(seen["input"]) == storage(seen["hidden"])
        return same_input and (capped is not None or storage(logits) == storage(seen["product"]))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast("cpu", self.dtype)


def _gradient_hooks(
    live: LiveBytes, parameters: list[nn.Parameter], first: list[nn.Parameter]
) -> list[Any]:
    """Count a finished gradient as one, and tell the first layer's backward from that of the rest."""
    missing = {id(p) for p in parameters} - {id(p) for p in first}

    def finished(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        live.move(parameter.grad, GRADIENTS)
        missing.discard(id(parameter))
        if not missing:
            live.enter(BACKWARD_END, WORKING)

    return [p.register_post_accumulate_grad_hook(finished) for p in parameters]  # type: ignore[no-untyped-call]
