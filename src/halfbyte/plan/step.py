"""Owns tracing a training step without data: a few layers of fake tensors represent the whole model.

The step is the real one: autograd runs transformers' model, bitsandbytes' layers, PEFT's adapter and our
loss on fake tensors while every byte is counted. No figure comes from a formula that could become
outdated when a library changes.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from halfbyte.config.schema import Adapter, Model, Speed
from halfbyte.data.prefix_tree import shared_prefix_nodes
from halfbyte.errors import UntraceableError
from halfbyte.forward.flat_lora import FlatLora
from halfbyte.forward.fuse import fuse
from halfbyte.forward.loss import Head, traced_head_losses
from halfbyte.forward.packed import gather_rows, tree_inputs, tree_refusal
from halfbyte.kernels.capability import AMPERE, Capability, planned_for
from halfbyte.model.adapter import place_adapter, trainable_parameters
from halfbyte.model.new_tokens import row_layers
from halfbyte.model.precision import DTYPES, keep_residual_in_fp32
from halfbyte.model.skeleton import build_for_step, layer_list, quantise
from halfbyte.plan import fake, phases
from halfbyte.plan.layer_cut import Cut, cut, keep_layers, layer_kinds
from halfbyte.plan.live import LiveBytes, Peak
from halfbyte.plan.shape import StepShape
from halfbyte.plan.step_hooks import gradient_hooks, logits_are_the_heads

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What models raise that need data, a mask or an attention other than the plan's. NotImplementedError is a
# RuntimeError.
UNTRACEABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
Batch = tuple[dict[str, Any], torch.Tensor, torch.Tensor]


class TracedStep:
    """A model with its adapter, made of fake tensors, whose step can be traced at any shape.

    Args:
        config: the model's configuration; its language part is trained.
        model: the section with precision and attention.
        adapter: the section with the LoRA settings.
        speed: the section with the optimisations to use.
        dtype: dtype of the matrix products.
        capability: compute capability of the card; None for a CPU.
        num_new_tokens: tokens whose rows of embedding and head are trained.

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
        capability: Capability | None,
        num_new_tokens: int = 0,
    ) -> None:
        fake.register_attention()
        text = config.get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        grouped = getattr(text, "num_key_value_heads", None) not in (None, heads)
        # On CUDA grouped heads of padded rows use flash kernels, which need 16 bits and Ampere, or the unfused
        # maths.
        flash = capability is None or (capability >= AMPERE and dtype != torch.float32)
        unfused = grouped and not flash
        attention = fake.MATH_ATTENTION if unfused else fake.ATTENTION
        self.model, settled = build_for_step(config, dtype, model.attention, attention)
        self.speed = speed
        self.shares, self.padded = speed.layout(tree_refusal(self.model, settled))
        self.kinds = layer_kinds(self.model)
        self.cut: Cut = cut(self.kinds)
        self.dtype, self.capability = dtype, capability
        types = getattr(self.model.config.get_text_config(), "layer_types", None)
        self.types: list[str] | None = list(types) if types else None
        all_layers = layer_list(self.model)
        self.layers = {i: all_layers[i] for i in self.cut.layers}
        try:
            self._use_layers(self.cut.layers)
        except UNTRACEABLE as error:
            raise UntraceableError(
                f"{type(self.model).__name__}: its layers cannot be cut: {error}"
            ) from error
        quantise(self.model, model.precision, model.double_quant, dtype)
        # PiSSA, OLoRA and LoftQ only start from other values; the tensors have the same shapes.
        with torch.device("meta"):
            default_init = adapter.model_copy(update={"init": "default"})
            # Which tokens are new makes no difference, but the first rows of the head are those traced.
            added = range(num_new_tokens)
            self.adapted = place_adapter(self.model, default_init, seed=0, added=added)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            self.fixed = fake.materialise(self.adapted)
            if dtype == torch.float16 and model.precision not in DTYPES:
                keep_residual_in_fp32(self.model)
            with planned_for(capability):
                fuse(self.adapted, speed, dtype, probe=False)
            self.flat_lora: FlatLora | None = getattr(self.model, "flat_lora", None)
            if self.flat_lora is not None:
                self.fixed += [self.flat_lora.values, self.flat_lora.copies]
        self._traced: dict[tuple[Any, ...], LiveBytes] = {}
        self.num_trainable = self.over_trainable(lambda parameter: parameter.numel())

    def over_trainable(self, measure: Callable[[torch.Tensor], int]) -> int:
        """Sum a measure over the trainable parameters of the whole model."""

        def sum_over(layers: tuple[int, ...]) -> Counter[str]:
            self._use_layers(layers)
            return Counter(sum=sum(map(measure, trainable_parameters(self.adapted).values())))

        return self._extrapolate({layers: sum_over(layers) for layers in self._variants()})["sum"]

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copy of a weight of the adapter that products read; 0 where there is none."""
        return 0 if self.flat_lora is None else self.flat_lora.copies.element_size()

    def peaks(self, shape: StepShape) -> dict[str, Peak]:
        """Return the most live bytes of each phase, without weights, adapter and optimizer."""
        traces = self._traces(shape, self._step)
        return {phase: self._extrapolate_peak(phase, traces) for phase in phases.PHASES}

    def evaluation(self, shape: StepShape) -> Peak:
        """Return the most live bytes while the same rows are evaluated without gradients."""
        return self._extrapolate_peak(phases.EVALUATION, self._traces(shape, self._evaluate))

    def largest_terms(self, shape: StepShape) -> Counter[str]:
        """Return the most bytes of each term by itself, at any time of the step."""
        traces = self._traces(shape, self._step)
        return self._extrapolate({layers: live.largest_terms for layers, live in traces.items()})

    def kept(self, shape: StepShape) -> int:
        """Return the bytes that the forward pass keeps for the backward pass."""
        traces = self._traces(shape, self._step)
        kept = {layers: Counter(kept=live.kept_bytes) for layers, live in traces.items()}
        return self._extrapolate(kept)["kept"]

    def kept_per_layer(self, shape: StepShape) -> list[tuple[str, int, int]]:
        """Return for each kind of layer its name, its count and the bytes that a layer keeps."""
        kept_by_kind = self.kept_by_kind(shape)
        return [(str(kind[0]), self.kinds.count(kind), kept) for kind, kept in kept_by_kind.items()]

    def kept_by_kind(self, shape: StepShape) -> dict[tuple[Any, ...], int]:
        """Return the bytes that a layer of each kind keeps, for kinds with an extra layer."""
        base = self._trace(self.cut.base, shape, self._step).kept_bytes
        kept_bytes = {}
        for kind in dict.fromkeys(self.kinds):
            spare = [layer for layer, _ in self.cut.extra if self.kinds[layer] == kind]
            if spare:
                layers = tuple(sorted((*self.cut.base, spare[0])))
                kept_bytes[kind] = self._trace(layers, shape, self._step).kept_bytes - base
        return kept_bytes

    def cache(self, context: int) -> tuple[int, int]:
        """Return the bytes of one row's KV cache, and the most that its prefill takes besides it."""
        total = self._extrapolate(
            {layers: self._prefill(layers, context) for layers in self._variants()}
        )
        return total["cache"], total["peak"] - total["cache"]

    def _prefill(self, layers: tuple[int, ...], context: int) -> Counter[str]:
        self._use_layers(layers)
        self.adapted.eval()
        with self._live_bytes("prefill") as live, torch.no_grad():
            live.enter(phases.EVALUATION, phases.WORKING)
            ids = torch.zeros((1, context), dtype=torch.long)
            with fake.autocast(self.dtype):
                out = self.model(ids, use_cache=True, logits_to_keep=1)
            # A sliding window keeps a slice, whose whole storage is freed with the next token.
            cache = sum(
                tensor.nbytes
                for layer in out.past_key_values.layers
                for tensor in vars(layer).values()
                if isinstance(tensor, torch.Tensor)
            )
            peak = live.peaks[phases.EVALUATION].total_bytes
        return Counter(cache=cache, peak=peak)

    def _variants(self) -> list[tuple[int, ...]]:
        base = self.cut.base
        return [base, *(tuple(sorted((*base, layer))) for layer, _ in self.cut.extra)]

    def _extrapolate(self, measured: dict[tuple[int, ...], Counter[str]]) -> Counter[str]:
        """Compute a quantity of the whole model from that of each variant of its layers."""
        base, *extended = self._variants()
        total = Counter(measured[base])
        for layers, (_, times) in zip(extended, self.cut.extra, strict=True):
            for term in set(measured[layers]) | set(measured[base]):
                total[term] += times * (measured[layers][term] - measured[base][term])
        return total

    def _extrapolate_peak(self, phase: str, traces: dict[tuple[int, ...], LiveBytes]) -> Peak:
        terms = self._extrapolate(
            {layers: live.peaks[phase].terms for layers, live in traces.items()}
        )
        return Peak(sum(terms.values()), terms)

    def _use_layers(self, layers: tuple[int, ...]) -> None:
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
        """Count live bytes while a model of these layers does this work; each trace is cached."""
        key = (layers, shape, work.__name__)
        if key not in self._traced:
            self._traced[key] = self._run(layers, shape, work)
        return self._traced[key]

    def _run(
        self,
        layers: tuple[int, ...],
        shape: StepShape,
        work: Callable[[LiveBytes, StepShape], None],
    ) -> LiveBytes:
        self._use_layers(layers)
        if shape.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            # Leave exactly one hook, also where TRL has set one; the last line removes it.
            self.model.disable_input_require_grads()
            self.model.enable_input_require_grads()
        try:
            _ = self.tiled  # evaluated before anything is counted, because it runs the model
            with self._live_bytes("training step") as live:
                work(live, shape)
        finally:
            if shape.checkpointing:
                self.model.gradient_checkpointing_disable()
                self.model.disable_input_require_grads()
        return live

    @contextlib.contextmanager
    def _live_bytes(self, what: str) -> Iterator[LiveBytes]:
        """Count live bytes of fake tensors inside the block, without weights and adapter.

        Raises:
            UntraceableError: the model depends on values, which fake tensors do not have.
        """
        live = LiveBytes()
        try:
            with planned_for(self.capability), self.fake, live:
                for tensor in self.fixed:
                    live.ignore(tensor)
                yield live
        except UNTRACEABLE as error:
            raise UntraceableError(
                f"the {what} of {type(self.model).__name__} cannot be traced: {error}"
            ) from error

    def _step(self, live: LiveBytes, shape: StepShape) -> None:
        parameters = list(trainable_parameters(self.adapted).values())
        rows = [p for layer in row_layers(self.model) for p in layer.parameters()]
        hooks = gradient_hooks(live, parameters, [*self.layers[0].parameters(), *rows])
        self.adapted.train()
        if shape.accumulates:
            live.enter(phases.FORWARD, phases.GRADIENTS)
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
        live.enter(phases.FORWARD, phases.ACTIVATIONS)
        if self.flat_lora is not None:
            self.flat_lora.refresh(self.dtype)
        batch = self._batch(shape)
        with fake.autocast(self.dtype):
            total = self._loss(live, phases.HEAD, batch)
        live.kept_bytes = live.total_bytes - live.terms[phases.GRADIENTS]
        live.enter(phases.BACKWARD, phases.WORKING)
        torch.autograd.backward(total)
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None

    @torch.no_grad()
    def _evaluate(self, live: LiveBytes, shape: StepShape) -> None:
        self.adapted.eval()
        live.enter(phases.EVALUATION, phases.WORKING)
        batch = self._batch(shape)
        with fake.autocast(self.dtype):
            self._loss(live, phases.EVALUATION, batch)

    def _batch(self, shape: StepShape) -> Batch:
        """Return the arguments of the pass, and the positions (N,) and ids (N,) of its predictions."""
        positions = torch.zeros(shape.num_labels, dtype=torch.long)
        if self.padded:
            ids = torch.zeros((len(shape.lengths), shape.lengths[0]), dtype=torch.long)
            return {"input_ids": ids}, positions, torch.zeros_like(positions)
        nodes = shape.nodes or shared_prefix_nodes(shape.lengths, shape.shared)
        ids = torch.zeros((1, max(node.end for node in nodes)), dtype=torch.long)
        tree = fake.planned_tree(nodes, varlen=self.speed.varlen_attention)
        return tree_inputs(ids, torch.zeros_like(ids), tree), positions, torch.zeros_like(positions)

    def _loss(self, live: LiveBytes, phase: str, batch: Batch) -> torch.Tensor:
        """Sum the loss as ``add_token_loss`` does; ``phase`` is that of the loss head."""
        inputs, sources, targets = batch
        term = phases.LOGITS if phase == phases.HEAD else phases.WORKING
        if not (self.tiled and self.speed.labelled_head):
            hook = self.model.base_model.register_forward_hook(lambda *_: live.enter(phase, term))
            logits = gather_rows(self.model(**inputs, use_cache=False).logits, sources)
            hook.remove()
            live.enter(phase, term)  # again, for models that bypass their base model
            return nn.functional.cross_entropy(logits.float(), targets, reduction="none").sum()
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        live.enter(phase, term)
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        states = gather_rows(hidden, sources)
        head = Head.of(self.model)
        return traced_head_losses(head, states, targets, cap).sum()

    @functools.cached_property
    def tiled(self) -> bool:
        """Whether the logits are the head's product of the last hidden states, with at most a soft cap.

        Where they are not (Granite and Cohere scale them), ``add_token_loss`` uses the model's logits.
        """

        def run() -> torch.Tensor:
            with self._live_bytes("training step") as live, torch.no_grad():
                live.enter(phases.EVALUATION, phases.WORKING)
                logits: torch.Tensor = self.model(
                    torch.zeros((1, 8), dtype=torch.long), use_cache=False
                ).logits
            return logits

        return logits_are_the_heads(self.model, run)
