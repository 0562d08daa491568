"""Owns the rules that involve several keys, or the config and the environment."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from halfbyte.config.evaluation import Baseline
from halfbyte.config.schema import Run
from halfbyte.config.section import FOUR_BIT, OPPONENTS, OwnVariant
from halfbyte.config.source import SECRET, KeyPath, Source

RUN_NAME = re.compile(r"(?!\.+$)[\w.=+,~-]{1,120}", re.ASCII)


Rule = tuple[bool, str, str]  # (whether it is a fault, dotted key, message with remedy)
Written = Callable[[str], bool]


def cross_faults(run: Run, source: Source, *, resolved: bool) -> list[str]:
    """Return a line per contradiction and, unless the config is resolved, per option without effect."""

    def written(dotted: str) -> bool:
        if resolved:
            return False
        node: Any = source.values
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node is not None

    rules = [
        *_model_rules(run, written),
        *_adapter_rules(run),
        *_train_rules(run, written),
        *_data_rules(run, written),
        *_opponent_rules(run, written),
        *_eval_rules(run, written),
    ]
    return [
        f"{source.place(tuple(dotted.split('.')))}: {dotted} {text}"
        for is_fault, dotted, text in rules
        if is_fault
    ]


def _model_rules(run: Run, written: Written) -> list[Rule]:
    model, stored = run.model, run.model.precision
    return [
        (
            written("model.double_quant") and model.double_quant and stored not in FOUR_BIT,
            "model.double_quant",
            f"has no effect with model.precision {stored}; it belongs to nf4 and fp4",
        ),
        (
            stored in ("fp32", "bf16", "fp16") and model.compute_dtype not in ("auto", stored),
            "model.compute_dtype",
            f"is {model.compute_dtype} but model.precision is {stored}: unquantised weights compute in"
            f" the dtype they are stored in; remove it or write {stored}",
        ),
    ]


def _adapter_rules(run: Run) -> list[Rule]:
    adapter, stored = run.adapter, run.model.precision
    return [
        (
            adapter.init in ("pissa", "olora") and stored != "fp32",
            "adapter.init",
            f"is {adapter.init}, which rewrites the base weights; on a {stored} base they would be"
            " rounded a second time and the saved adapter would not fit the published base. Use default,"
            " or model.precision fp32",
        ),
        (
            adapter.init == "loftq" and stored not in FOUR_BIT,
            "adapter.init",
            f"is loftq, which needs a 4-bit base; model.precision is {stored}",
        ),
        (
            adapter.init in ("loftq", "pissa", "olora") and adapter.dora,
            "adapter.init",
            f"is {adapter.init}, which PEFT does not combine with adapter.dora",
        ),
        (
            adapter.init == "loftq" and (adapter.alpha != adapter.r or adapter.rslora),
            "adapter.init",
            f"is loftq, which corrects the quantisation error only where the update is not scaled: set"
            f" adapter.alpha={adapter.r} and adapter.rslora=false",
        ),
        (
            adapter.targets == [],
            "adapter.targets",
            "is empty: nothing would be trained",
        ),
    ]


def _train_rules(run: Run, written: Written) -> list[Rule]:
    train = run.train
    return [
        (
            written("speed.share_prefixes")
            and run.speed.share_prefixes
            and not run.speed.no_padding,
            "speed.share_prefixes",
            "has no effect with speed.no_padding false: padded rows share nothing",
        ),
        (
            train.micro_batch_size != "auto" and train.batch_size % train.micro_batch_size != 0,
            "train.batch_size",
            f"is {train.batch_size}, no multiple of train.micro_batch_size {train.micro_batch_size}",
        ),
        (
            train.scheduler == "constant"
            and written("train.warmup_frac")
            and train.warmup_frac > 0,
            "train.warmup_frac",
            "has no effect with train.scheduler constant; use constant_with_warmup",
        ),
        (
            written("train.keep_checkpoints") and train.save_steps == 0,
            "train.keep_checkpoints",
            "has no effect with train.save_steps 0",
        ),
        (
            train.eval_steps > 0 and run.data.test is None and not _holds_out(run),
            "train.eval_steps",
            "has no effect without held-out rows: set data.test, data.validation_frac or data.test_frac",
        ),
        (
            written("train.sample_tokens") and train.num_samples == 0,
            "train.sample_tokens",
            "has no effect with train.num_samples 0",
        ),
        (
            run.name is not None and not RUN_NAME.fullmatch(run.name),
            "name",
            f"is {run.name!r}; allowed are up to 120 letters, digits and . _ = + , ~ -",
        ),
    ]


def _holds_out(run: Run) -> bool:
    return run.data.validation_frac + run.data.test_frac > 0


def _data_rules(run: Run, written: Written) -> list[Rule]:
    data = run.data
    return [
        (
            data.test is not None and data.test_frac > 0,
            "data.test_frac",
            "has no effect beside data.test, which names the test rows",
        ),
        (
            written("data.test_split") and data.test is None,
            "data.test_split",
            "has no effect without data.test",
        ),
        (
            data.validation_frac + data.test_frac >= 1,
            "data.test_frac",
            f"and data.validation_frac hold out {data.validation_frac + data.test_frac:g} of the rows:"
            " nothing is left to train on",
        ),
        (
            isinstance(data.test, list) and any(entry.weight != 1 for entry in data.test),
            "data.test",
            "has an entry with a weight: the comparison takes each of its rows once",
        ),
        (
            len(set(data.new_tokens)) < len(data.new_tokens),
            "data.new_tokens",
            "names a token twice",
        ),
        (
            bool(data.new_tokens) and run.adapter.init in ("pissa", "olora"),
            "data.new_tokens",
            f"does not go with adapter.init {run.adapter.init}; use default",
        ),
        (
            data.format == "text" and data.system is not None,
            "data.system",
            "has no effect on raw text",
        ),
    ]


def _baseline_rules(baseline: Baseline) -> list[Rule]:
    in_llama_cpp = baseline.engine == "llama.cpp"
    return [
        (
            in_llama_cpp and not baseline.model.endswith(".gguf"),
            "eval.baselines",
            f"{baseline.name}: engine llama.cpp reads a .gguf file, and model is {baseline.model}",
        ),
        (
            in_llama_cpp and baseline.precision is not None,
            "eval.baselines",
            f"{baseline.name}: precision has no effect with engine llama.cpp",
        ),
        (
            not in_llama_cpp and baseline.gpu_layers != 0,
            "eval.baselines",
            f"{baseline.name}: gpu_layers has no effect without engine llama.cpp",
        ),
    ]


def _opponent_rules(run: Run, written: Written) -> list[Rule]:
    answering = {*run.eval.variants, *run.eval.allowed_opponents}
    shown = {"base-full-fewshot", "base-full-retrieval"} & answering
    return [
        (
            written("eval.fewshot") and not shown,
            "eval.fewshot",
            "has no effect without base-full-fewshot in eval.variants or base-full-retrieval in eval.opponents",
        ),
        (
            bool(run.eval.opponents) and run.eval.metrics[0] == "held_out_loss",
            "eval.opponents",
            "has no effect where held_out_loss is the first of eval.metrics: opponents answer, and have no loss",
        ),
    ]


def _eval_rules(run: Run, written: Written) -> list[Rule]:
    pattern, names = run.eval.answer_pattern, [baseline.name for baseline in run.eval.baselines]
    repeated = sorted({name for name in names if names.count(name) > 1})
    tasks = [benchmark.task for benchmark in run.eval.benchmarks]
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    without = "has no effect without eval.benchmarks"
    taken = sorted(set(names) & {*get_args(OwnVariant), *OPPONENTS, *run.eval.variants})
    return [
        (
            not run.eval.variants and not run.eval.baselines,
            "eval.variants",
            "is empty, and eval.baselines too: there is nothing to compare",
        ),
        (
            written("track.project") and run.track.wandb == "off",
            "track.project",
            "has no effect with track.wandb off",
        ),
        (
            "gguf-lora" in run.eval.variants,
            "eval.variants",
            "names gguf-lora, an adapter without its base; export the merged model: --to gguf --quant q8_0",
        ),
        (bool(twice), "eval.benchmarks", f"names {', '.join(twice)} more than once"),
        *(
            (written(f"eval.{key}") and not tasks, f"eval.{key}", without)
            for key in ("benchmark_data", "benchmark_chat", "run_code")
        ),
        (bool(repeated), "eval.baselines", f"names {', '.join(repeated)} more than once"),
        *(rule for baseline in run.eval.baselines for rule in _baseline_rules(baseline)),
        (bool(taken), "eval.baselines", f"names {', '.join(taken)}, which a variant has"),
        (
            ("schema_valid" in run.eval.metrics) != (run.eval.json_schema is not None),
            "eval.json_schema",
            "and the metric schema_valid need each other",
        ),
        (
            pattern is not None and "exact_match" not in run.eval.metrics,
            "eval.answer_pattern",
            "has no effect without exact_match in eval.metrics",
        ),
        (
            pattern is not None and _pattern_fault(pattern) != "",
            "eval.answer_pattern",
            _pattern_fault(pattern or ""),
        ),
    ]


def _pattern_fault(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return f"is no regular expression: {error}"
    return "" if groups == 1 else f"has {groups} groups; exactly one is needed"


def secret_faults(source: Source) -> list[str]:
    """Return a line per secret in the config, as it would end up in run.yaml, W&B and git."""
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


def _world_size(environ: Mapping[str, str], faults: list[str]) -> int:
    text = environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        faults.append(
            f"environment: WORLD_SIZE is {text!r}; a number of processes is expected; unset it"
        )
        return 1
    return int(text)


def environment_faults(run: Run, environ: Mapping[str, str]) -> list[str]:
    """Return a line per variable, set by ``accelerate launch`` or by hand, that contradicts the config."""
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
    world, rows = _world_size(environ, faults), run.train.micro_batch_size
    if world > 1 and run.train.batch_size % ((1 if rows == "auto" else rows) * world):
        size = "" if rows == "auto" else f" of train.micro_batch_size {rows}"
        faults.append(
            f"environment: {world} processes{size} do not divide train.batch_size"
            f" {run.train.batch_size}; change one of them"
        )
    for variable, what in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
    ):
        if environ.get(variable, "false").lower() in ("true", "1", "yes", "y", "on", "t"):
            faults.append(
                f"environment: {variable} is set, but halfbyte trains on one process or with DDP, not"
                f" with {what}; unset it or choose another accelerate config"
            )
    return faults
