"""Owns the rules that tie several keys, the environment and the config together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from halfbyte.config.schema import Run
from halfbyte.config.source import KeyPath, Source

FOUR_BIT = ("nf4", "fp4")
SECRET = re.compile(r"hf_[A-Za-z0-9]{30,}|\b[0-9a-f]{40}\b|wandb_v1_\w{20,}|sk-[A-Za-z0-9_-]{20,}")
RUN_NAME = re.compile(r"[\w.=+,~-]+")


def cross_faults(run: Run, source: Source) -> list[str]:
    """Contradictions and options without effect, each as one line."""

    def written(*path: str) -> bool:
        node: Any = source.values
        for part in path:
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return node is not None

    def fault(path: KeyPath, text: str) -> str:
        return f"{source.place(path)}: {'.'.join(map(str, path))} {text}"

    faults = []
    four_bit = run.model.precision in FOUR_BIT
    if written("model", "double_quant") and run.model.double_quant and not four_bit:
        faults.append(
            fault(
                ("model", "double_quant"),
                f"has no effect with model.precision {run.model.precision}; it belongs to nf4 and fp4",
            )
        )
    stored = run.model.precision
    if stored in ("fp32", "bf16", "fp16") and run.model.compute_dtype not in ("auto", stored):
        faults.append(
            fault(
                ("model", "compute_dtype"),
                f"is {run.model.compute_dtype} but model.precision is {stored}: unquantised weights"
                f" compute in the dtype they are stored in; remove it or write {stored}",
            )
        )
    if run.model.revision and (run.model.name.startswith(("pypi:", "/", ".", "~"))):
        faults.append(
            fault(("model", "revision"), f"has no effect: {run.model.name!r} is not on the Hub")
        )
    if run.adapter.init in ("pissa", "olora") and (four_bit or stored == "int8"):
        faults.append(
            fault(
                ("adapter", "init"),
                f"is {run.adapter.init}, which rewrites the base weights; on a {stored} base they would"
                " be quantised a second time and the saved adapter would not fit the published base."
                " Use default or loftq, or model.precision bf16/fp32",
            )
        )
    if run.adapter.init == "loftq" and not four_bit:
        faults.append(
            fault(("adapter", "init"), f"is loftq, which needs a 4-bit base; model.precision is {stored}")
        )
    if run.adapter.init == "loftq" and run.adapter.dora:
        faults.append(
            fault(("adapter", "init"), "is loftq, which PEFT does not combine with adapter.dora")
        )
    if isinstance(run.adapter.targets, list) and not run.adapter.targets:
        faults.append(fault(("adapter", "targets"), "is empty: nothing would be trained"))
    faults += _train_faults(run, written, fault)
    faults += _data_faults(run, written, fault)
    return faults


def _train_faults(run: Run, written: Any, fault: Any) -> list[str]:
    faults = []
    train = run.train
    if train.batch_size % train.micro_batch_size:
        faults.append(
            fault(
                ("train", "batch_size"),
                f"is {train.batch_size}, no multiple of train.micro_batch_size {train.micro_batch_size}",
            )
        )
    if train.scheduler == "constant" and written("train", "warmup_frac") and train.warmup_frac > 0:
        faults.append(
            fault(
                ("train", "warmup_frac"),
                "has no effect with train.scheduler constant; use constant_with_warmup",
            )
        )
    if written("train", "sample_tokens") and train.num_samples == 0:
        faults.append(fault(("train", "sample_tokens"), "has no effect with train.num_samples 0"))
    return faults


def _data_faults(run: Run, written: Any, fault: Any) -> list[str]:
    faults = []
    data = run.data
    if data.test is not None and data.test_frac > 0:
        faults.append(
            fault(("data", "test_frac"), "has no effect beside data.test, which names the test rows")
        )
    if written("data", "test_split") and data.test is None:
        faults.append(fault(("data", "test_split"), "has no effect without data.test"))
    if data.format == "text" and data.system is not None:
        faults.append(fault(("data", "system"), "has no effect on raw text"))
    if run.eval.answer_pattern is not None:
        try:
            groups = re.compile(run.eval.answer_pattern).groups
        except re.error as error:
            faults.append(fault(("eval", "answer_pattern"), f"is no regular expression: {error}"))
        else:
            if groups != 1:
                faults.append(
                    fault(("eval", "answer_pattern"), f"has {groups} groups; exactly one is needed")
                )
        if "exact_match" not in run.eval.metrics:
            faults.append(
                fault(("eval", "answer_pattern"), "has no effect without exact_match in eval.metrics")
            )
    names = [baseline.name for baseline in run.eval.baselines]
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.append(fault(("eval", "baselines"), f"names {name!r} twice"))
    if run.name is not None and not RUN_NAME.fullmatch(run.name):
        faults.append(
            fault(("name",), f"is {run.name!r}; allowed are letters, digits and . _ = + , ~ -")
        )
    return faults


def secret_faults(source: Source) -> list[str]:
    """Keys and tokens written into a config would end in run.yaml, W&B and git."""
    return [
        f"{source.place(path)}: {'.'.join(map(str, path))} looks like a secret key; take it out and"
        " put it in the environment (HF_TOKEN, WANDB_API_KEY)"
        for path, value in _strings(source.values, ())
        if path[-1] != "revision" and SECRET.search(value)
    ]


def _strings(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _strings(inner, (*path, index))


def environment_faults(run: Run, environ: Mapping[str, str]) -> list[str]:
    """Variables set by ``accelerate launch`` or by hand that contradict the config."""
    faults = []
    mixed = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed not in ("no", run.model.compute_dtype):
        faults.append(
            f"environment: ACCELERATE_MIXED_PRECISION is {mixed!r} but model.compute_dtype is"
            f" {run.model.compute_dtype!r}; the config decides: launch with --mixed_precision no, or"
            f" set model.compute_dtype={mixed}"
        )
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        faults.append(
            f"environment: ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps!r}; accumulation follows"
            " from train.batch_size and train.micro_batch_size: unset it"
        )
    for variable, what in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
    ):
        if environ.get(variable, "false").lower() in ("true", "1"):
            faults.append(
                f"environment: {variable} is set, but halfbyte trains on one process or with DDP, not"
                f" with {what}; unset it or choose another accelerate config"
            )
    return faults
