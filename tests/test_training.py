"""Training on a random two-layer model: what moves, what does not, the same loss however it is batched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from safetensors.torch import load_file
from toys import edit_settings, run_script, unfinish, write_rows
from transformers import LlamaConfig
from wandb_history import history

from halfbyte.config import load_run
from halfbyte.data.prepare import prepare
from halfbyte.data.prepared import Prepared
from halfbyte.data.render import Renderer
from halfbyte.errors import ModelError, RunError
from halfbyte.model.adapter import attach_adapter, trainable_parameters
from halfbyte.model.load import load_config, load_model
from halfbyte.model.resolve import resolve_base
from halfbyte.model.tokenizer import load_tokenizer
from halfbyte.plan.devices import this_machine
from halfbyte.run_dir import read_jsonl
from halfbyte.tracking import choose_mode
from halfbyte.train.arguments import Passes
from halfbyte.train.batching import StepwiseSampler
from halfbyte.train.preflight import check_first_step
from halfbyte.train.setup import Setup, loss_rows, row_lengths, set_up
from halfbyte.train.tracking import Tracker
from halfbyte.train.trainer import TokenTrainer, build_trainer


def make_trainer(config: Path, *overrides: str) -> tuple[TokenTrainer, Prepared]:
    run = load_run(config, list(overrides))
    base = resolve_base(run.model.name)
    tokenizer = load_tokenizer(base)
    renderer = Renderer(tokenizer)
    prepared = prepare(run.data, renderer)
    loaded = load_model(base, run.model.precision, compute_dtype=run.model.compute_dtype)
    model = attach_adapter(loaded, run.adapter, run.seed, config.parent)
    size = run.train.micro_batch_size
    recompute = run.train.checkpointing not in ("auto", "off")
    passes = Passes(1 if size == "auto" else size, recompute, run.train.recomputed_layers)
    setup = Setup(run, renderer, prepared.train, loss_rows(prepared), loaded, model, passes)
    return build_trainer(setup, config.parent / "checkpoints", None), prepared


def metrics(run: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(run / "metrics.jsonl"))


def numbers(run: Path) -> list[dict[str, float]]:
    """What must repeat exactly: everything but speed and memory."""
    noisy = {"tokens_per_s", "memory_bytes"}
    return [{k: v for k, v in record.items() if k not in noisy} for record in metrics(run)]


def test_sampler_sorts_each_step_and_covers_each_row_once_an_epoch() -> None:
    lengths = [7, 3, 9, 1, 5, 8, 2, 6, 4, 10]
    sampler = StepwiseSampler(lengths, step_rows=4, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(10))
    assert len(sampler) == 10
    for start in (0, 4, 8):
        step = [lengths[row] for row in first[start : start + 4]]
        assert step == sorted(step)
    assert first == list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert {frozenset(second[:4])} != {frozenset(first[:4])}
    assert list(StepwiseSampler(lengths, 4, seed=1)) != first


def test_epochs_are_shuffled_differently_through_accelerate(make_config: MakeConfig) -> None:
    trainer, _ = make_trainer(make_config())
    loader = trainer.get_train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        orders.append([one.layout.rows for batch in loader for one in batch["layouts"]])
    assert orders[0] == orders[2] != orders[1]


def test_adapters_are_fp32_and_the_only_thing_that_learns(make_config: MakeConfig) -> None:
    trainer, _ = make_trainer(make_config())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    learning = trainable_parameters(trainer.model)
    assert learning
    assert all("lora_" in name for name in learning)
    assert {p.dtype for p in learning.values()} == {torch.float32}
    trainer.train()
    moved = {
        name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == set(learning)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_construction_keeps_the_adapters_values(make_config: MakeConfig, compute: str) -> None:
    """TRL casts them to bf16 and so would round A's start values."""
    config = make_config(model={"compute_dtype": compute})
    run = load_run(config, [])
    loaded = load_model(resolve_base(run.model.name), "nf4", compute_dtype=run.model.compute_dtype)
    fresh = attach_adapter(loaded, run.adapter, run.seed, config.parent)
    wanted = {name: p.detach().clone() for name, p in trainable_parameters(fresh).items()}
    trainer, _ = make_trainer(config)
    found = trainable_parameters(trainer.model)
    assert wanted
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_steps_are_the_same_however_the_batch_is_cut(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Loss and gradient norm of four steps for 4x1, 2x2 and 1x4 rows, and as the plan cuts it."""
    config = make_config()
    found = []
    for size in (4, 2, 1, "auto"):
        run_script(
            "train/sft.py",
            config,
            f"name=cut{size}",
            f"train.micro_batch_size={size}",
            "track.wandb=off",
        )
        folder = tmp_path / "runs" / f"cut{size}"
        plan = json.loads((folder / "manifest.json").read_text())["memory"]
        # There is room for all rows of the step at once.
        assert plan["micro_batch_size"] == (4 if size == "auto" else size)
        assert plan["micro_batch_size"] * plan["accumulation"] == 4
        records = [r for r in metrics(folder) if "loss" in r]
        found.append([(r["loss"], r["grad_norm"]) for r in records])
    assert len(found[0]) == 4
    for other in found[1:]:
        torch.testing.assert_close(
            torch.tensor(found[0]), torch.tensor(other), rtol=1e-5, atol=1e-5
        )


def test_first_loss_is_transformers_own_mean_over_labelled_tokens(make_config: MakeConfig) -> None:
    trainer, prepared = make_trainer(make_config(), "train.max_steps=1")
    order = list(trainer._get_train_sampler())[:4]
    model = trainer.model.get_base_model()
    total = count = 0.0
    for row in order:
        encoded = prepared.train[row].encoded
        out = model(torch.tensor([encoded.ids]), labels=torch.tensor([encoded.labels]))
        total += float(out.loss.detach()) * encoded.num_supervised
        count += encoded.num_supervised
    result = trainer.train()
    assert result.training_loss == pytest.approx(total / count, rel=1e-5)


def test_weights_of_rows_are_factors_of_their_losses_and_of_the_divisor(
    make_config: MakeConfig,
) -> None:
    config = make_config()
    rows = [json.loads(line) for line in (config.parent / "train.jsonl").open(encoding="utf-8")]
    weights = [(0.25, 1, 2)[number % 3] for number in range(len(rows))]
    write_rows(
        config.parent / "train.jsonl",
        [row | {"weight": weight} for row, weight in zip(rows, weights, strict=True)],
    )
    trainer, prepared = make_trainer(config, "train.max_steps=1")
    order = list(trainer._get_train_sampler())[:4]
    model = trainer.model.get_base_model()
    total = count = 0.0
    for row in order:
        example = prepared.train[row]
        ids, labels = torch.tensor([example.encoded.ids]), torch.tensor([example.encoded.labels])
        num_labelled = example.row.weight * example.encoded.num_supervised
        total += float(model(ids, labels=labels).loss.detach()) * num_labelled
        count += num_labelled
    result = trainer.train()
    assert result.training_loss == pytest.approx(total / count, rel=1e-5)


def test_held_out_loss_is_the_mean_over_tokens_not_over_batches(make_config: MakeConfig) -> None:
    trainer, prepared = make_trainer(make_config())
    model = trainer.model.get_base_model()
    total = count = 0.0
    for example in prepared.test:
        ids, labels = torch.tensor([example.encoded.ids]), torch.tensor([example.encoded.labels])
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * example.encoded.num_supervised
        count += example.encoded.num_supervised
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_training_lowers_the_loss(trained_run: Path) -> None:
    losses = [record["loss"] for record in metrics(trained_run) if "loss" in record]
    assert losses[-1] < losses[0]


def test_check_before_step_one_changes_nothing(make_config: MakeConfig) -> None:
    trainer, _ = make_trainer(make_config(adapter={"dropout": 0.5}))
    before = {name: p.detach().clone() for name, p in trainable_parameters(trainer.model).items()}
    state = torch.get_rng_state()
    assert check_first_step(trainer)[0] > 0
    assert torch.equal(torch.get_rng_state(), state)
    after = trainable_parameters(trainer.model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in after.values())


def test_check_before_step_one_names_an_adapter_that_cannot_learn(make_config: MakeConfig) -> None:
    trainer, _ = make_trainer(make_config())
    name = next(name for name in trainable_parameters(trainer.model) if "lora_A" in name)
    trainable_parameters(trainer.model)[name].data.zero_()
    with pytest.raises(
        RunError, match=r"before step 1: 1 adapter weights cannot learn: .*lora_B.*zero"
    ):
        check_first_step(trainer)


def test_not_finite_loss_is_an_error_before_step_one(make_config: MakeConfig) -> None:
    trainer, _ = make_trainer(make_config())
    next(iter(trainable_parameters(trainer.model).values())).data.fill_(float("nan"))
    with pytest.raises(RunError, match=r"before step 1: the loss on the longest rows is nan"):
        check_first_step(trainer)


def test_not_finite_loss_stops_before_the_weights_change(make_config: MakeConfig) -> None:
    trainer, _ = make_trainer(make_config())
    poisoned, *others = trainable_parameters(trainer.model).values()
    poisoned.data.fill_(float("nan"))
    before = [p.detach().clone() for p in others]
    with pytest.raises(
        RunError, match=r"step 1: the adapter's weight .*lora_A.* holds NaN or infinity"
    ):
        trainer.train()
    assert all(torch.equal(p, value) for p, value in zip(others, before, strict=True))


def test_nan_is_never_written_as_a_number(make_config: MakeConfig, tmp_path: Path) -> None:
    from halfbyte.run_dir import RunDir

    tracker = Tracker(load_run(make_config(track={"wandb": "off"}), []), RunDir(tmp_path))
    with pytest.raises(RunError, match=r"step 3: \{'loss': nan\}: training has diverged"):
        tracker.write({"step": 3, "loss": float("nan")})
    assert metrics(tmp_path) == []


def test_manifest_has_the_plan_beside_what_was_measured(trained_run: Path) -> None:
    memory = json.loads((trained_run / "manifest.json").read_text())["memory"]
    assert memory["checkpointing"] == "off"
    assert memory["predicted_peak_bytes"] == sum(memory["terms"].values())
    probe = memory["probe"]
    predicted, measured = probe["predicted_bytes"], probe["measured_bytes"]
    assert predicted.keys() == measured.keys()
    assert probe["error_frac"] == pytest.approx(predicted["peak"] / measured["peak"] - 1)
    # Above the start, as what other tests of the process hold is in the start.
    taken, planned = (each["peak"] - each["weights and adapter"] for each in (measured, predicted))
    assert planned == pytest.approx(taken, rel=0.05)
    assert planned > predicted["weights and adapter"]


def test_training_stops_before_weights_are_looked_for_when_they_cannot_fit(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with nothing but the config.json of a model of 9 TB."""
    folder = tmp_path / "huge"
    LlamaConfig(vocab_size=1 << 24, hidden_size=1 << 16, num_hidden_layers=1).save_pretrained(
        folder
    )
    config = make_config(model={"name": str(folder)})
    with pytest.raises(SystemExit) as caught:
        run_script("train/sft.py", config)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert f"error: the weights of {folder} take 8806" in told
    assert told.endswith("train.ignore_plan=true trains in spite of it\n")
    with pytest.raises(SystemExit) as caught:
        run_script("train/sft.py", config, "train.ignore_plan=true")
    assert caught.value.code == 1
    told = capsys.readouterr().err
    assert f"warning: the weights of {folder} take 8806" in told
    assert f"error: {folder}: holds no .safetensors file" in told


def test_run_folder_holds_what_later_steps_need(trained_run: Path) -> None:
    names = {path.name for path in trained_run.iterdir()}
    assert names >= {"run.yaml", "manifest.json", "ledger.json", "metrics.jsonl", "samples.jsonl"}
    manifest = json.loads((trained_run / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert manifest["steps"] == 4
    assert manifest["adapted_layers"] == 14  # 7 linear layers in each of 2 blocks
    assert manifest["libraries"]["trl"]
    assert {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "base.json"} <= {
        path.name for path in (trained_run / "adapter").iterdir()
    }
    samples = list(read_jsonl(trained_run / "samples.jsonl"))
    assert samples[0].keys() == {"step", "prompt", "wanted", "answer", "exact_match"}


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_resumed_run_repeats_the_uninterrupted_one_exactly(
    make_config: MakeConfig, tmp_path: Path, dropout: float
) -> None:
    config = make_config(
        adapter={"dropout": dropout},
        train={"max_steps": 12, "save_steps": 3, "keep_checkpoints": 9},
        track={"wandb": "off"},
    )
    run_script("train/sft.py", config, "name=whole")
    whole, again = tmp_path / "runs" / "whole", tmp_path / "runs" / "again"
    shutil.copytree(whole, again)
    # As if the machine had died at step 11, with the checkpoint of step 9 half written.
    edit_settings(again, "name: whole", "name: again")
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoints" / "checkpoint-12")
    (again / "checkpoints" / "checkpoint-9" / "optimizer.pt").unlink()
    unfinish(again)
    run_script("train/sft.py", config, "name=again")
    assert numbers(again) == numbers(whole)
    first, second = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (whole, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_run_goes_on_from_the_resolved_config_in_its_own_folder(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that errors about an untrained run name."""
    copy = tmp_path / "runs" / "tiny"
    shutil.copytree(trained_run, copy)
    edit_settings(copy, str(trained_run.parent), str(copy.parent))
    run_script("train/sft.py", copy / "run.yaml")
    assert f"{copy} is trained already" in capsys.readouterr().out


def test_checkpointing_is_on_in_the_check_before_step_one(make_config: MakeConfig) -> None:
    trainer, _ = make_trainer(make_config(), "train.checkpointing=on")
    check_first_step(trainer)
    layers = trainer.model.get_base_model().model.layers
    assert all(layer.gradient_checkpointing for layer in layers)


def test_so_many_layers_are_recomputed_from_the_first_on(make_config: MakeConfig) -> None:
    trainer, _ = make_trainer(make_config(), "train.checkpointing=1")
    check_first_step(trainer)
    layers = trainer.model.get_base_model().model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]


@pytest.mark.parametrize("share", ["validation_frac", "test_frac"])
@pytest.mark.parametrize("eval_steps", [0, 2])
def test_a_share_that_holds_out_no_row_is_refused_before_anything_is_loaded(
    make_config: MakeConfig, tmp_path: Path, share: str, eval_steps: int
) -> None:
    config = make_config(data={"test": None, share: 0.0001}, train={"eval_steps": eval_steps})
    run = load_run(config, [])
    base = resolve_base(run.model.name)
    renderer = Renderer(load_tokenizer(base))
    prepared = prepare(run.data, renderer)
    with pytest.raises(RunError, match=rf"data\.{share} 0\.0001 of 32 rows holds out none"):
        set_up(run, base, renderer, prepared, this_machine(), tmp_path)


def test_tokens_without_a_row_are_refused_before_anything_is_loaded(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    run = load_run(make_config(), [])
    base = resolve_base(run.model.name)
    tokenizer = load_tokenizer(base)
    size = load_config(base).get_text_config().vocab_size
    tokenizer.add_tokens([f"<extra{n}>" for n in range(size - len(tokenizer) + 1)])
    last = tokenizer.convert_ids_to_tokens(size)
    template = tokenizer.chat_template.replace("<|im_end|>", last)
    renderer = Renderer(tokenizer, template)
    prepared = prepare(run.data, renderer)
    with pytest.raises(ModelError) as caught:
        set_up(run, base, renderer, prepared, this_machine(), tmp_path)
    assert f"the stop token {last!r} has the id {size}, and the embedding {size} rows" in str(
        caught.value
    )
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no EOS token, which ends answers and pads rows"):
        set_up(run, base, Renderer(tokenizer, template), prepared, this_machine(), tmp_path)


def test_setup_holds_out_test_rows_where_there_are_no_validation_rows(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Training, its plan and ``train/plan.py --probe`` measure the loss on the same rows."""
    run = load_run(make_config(data={"validation_frac": 0.0}), [])
    base = resolve_base(run.model.name)
    renderer = Renderer(load_tokenizer(base))
    prepared = prepare(run.data, renderer)
    assert not prepared.validation
    setup = set_up(run, base, renderer, prepared, this_machine(), tmp_path)
    assert setup.held_out == prepared.test[:64] != []
    assert setup.planner is not None
    assert setup.planner.held_out == row_lengths(prepared.test[:64])


def test_finished_run_is_not_trained_again(
    trained_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = tmp_path / "runs"
    shutil.copytree(trained_run.parent, copy)
    before = (copy / "tiny" / "metrics.jsonl").read_text()
    config = trained_run.parents[1] / "tiny.yaml"
    run_script("train/sft.py", config, f"runs_dir={copy}")
    assert "is trained already" in capsys.readouterr().out
    assert (copy / "tiny" / "metrics.jsonl").read_text() == before


def test_offline_wandb_history_equals_metrics_jsonl(trained_run: Path) -> None:
    logged = [row for row in history(trained_run / "wandb") if "samples._type" not in row]
    assert logged == metrics(trained_run)
    assert any("eval_loss" in row for row in logged)
    assert any("samples._type" in row for row in history(trained_run / "wandb"))


@pytest.mark.slow
def test_training_without_any_wandb_key_ends_well(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    run_script("train/sft.py", make_config(track={"wandb": "auto"}))
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "manifest.json").read_text())["finished"] is True
    assert [row for row in history(run / "wandb") if "samples._type" not in row] == metrics(run)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "off"),
        ({"WANDB_DISABLED": "true", "WANDB_API_KEY": "k"}, "off"),
    ],
)
def test_wandb_mode_follows_key_and_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], wanted: str
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_mode("auto") == wanted
    assert choose_mode("offline") == "offline"


def test_wandb_key_in_netrc_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE")
    path = tmp_path / "netrc"
    path.write_text("machine api.wandb.ai login user password k\n")
    monkeypatch.setenv("NETRC", str(path))
    assert choose_mode("auto") == "online"


@pytest.mark.slow
def test_unreachable_wandb_server_falls_back_to_offline(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run_script("train/sft.py", make_config(track={"wandb": "online"}), "train.max_steps=1")
    run = tmp_path / "runs" / "tiny+train.max_steps=1"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert [row for row in history(run / "wandb") if "samples._type" not in row] == metrics(run)


def test_paged_optimizer_on_the_cpu_is_a_warning(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(make_config(), "train.optimizer=paged_adamw_8bit")
    assert "paged_adamw_8bit pages nothing on the CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    "train",
    [
        {"neftune_alpha": 5.0},
        {"checkpointing": "on"},
        {"optimizer": "paged_adamw_8bit"},
        {"scheduler": "constant"},
    ],
)
def test_option_trains(make_config: MakeConfig, tmp_path: Path, train: dict[str, Any]) -> None:
    config = make_config(train={"max_steps": 12, **train}, track={"wandb": "off"})
    run_script("train/sft.py", config)
    losses = [r["loss"] for r in metrics(tmp_path / "runs" / "tiny") if "loss" in r]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_checkpointing_gives_the_same_losses(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(track={"wandb": "off"})
    for value in ("off", "on", "1"):
        run_script("train/sft.py", config, f"train.checkpointing={value}", f"name=_{value}")
    off, *others = (
        [r["loss"] for r in metrics(tmp_path / "runs" / f"_{value}") if "loss" in r]
        for value in ("off", "on", "1")
    )
    for other in others:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(off), rtol=1e-6, atol=1e-6)
