"""New tokens: read inside text, begun as what they replace, trained as PEFT would, carried by all that follows."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_adapter import CPU32, disturb, logits
from torch import nn
from toys import chatml_tokenizer, llama_config, run_script, unfinish, write_config, write_rows
from transformers import LlamaForCausalLM

from halfbyte.config import load_run
from halfbyte.config.schema import Adapter, Model, Speed
from halfbyte.data.prefix_tree import lay_out
from halfbyte.data.questions import held_out_rows, questions
from halfbyte.errors import ConfigError
from halfbyte.eval.variants import Comparison, contenders
from halfbyte.forward.loss import Head, TokenLoss
from halfbyte.forward.packed import add_token_loss
from halfbyte.model.adapter import attach_adapter, load_adapter, save_adapter
from halfbyte.model.load import load_config, load_model
from halfbyte.model.new_tokens import new_ids, row_layers
from halfbyte.model.resolve import resolve_base
from halfbyte.model.tokenizer import load_tokenizer
from halfbyte.plan.step import TracedStep
from halfbyte.ship.merge_math import merged_tensors, read_updates
from halfbyte.trained.run import read_trained_run

GENES = ("<gene>", "<protein>")


def make_base(folder: Path, *, tied: bool, spare_rows: int = 0) -> Path:
    tokenizer = chatml_tokenizer()
    config = llama_config(len(tokenizer) + spare_rows, tie_word_embeddings=tied)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", tied=request.param)


def adapted(folder: Path, scratch: Path, precision: Any = "nf4") -> Any:
    loaded = load_model(resolve_base(str(folder), None, GENES), precision, compute=CPU32)
    model = attach_adapter(loaded, Adapter(r=4, alpha=8), 0, scratch)
    disturb(model)
    for layer in row_layers(model):
        for rows in {id(rows): rows for rows in layer.trainable_tokens_delta.values()}.values():
            rows.data += 0.1
    return loaded, model


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("start", [0, 20, 45])
def test_trained_rows_of_the_head_have_the_gradient_of_cross_entropy(
    softcap: float | None, start: int
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(40, 16, requires_grad=True)
    rows, weight = (3 * torch.randn(5, 16)).requires_grad_(), 3 * torch.randn(50, 16)
    labels = torch.cat([torch.randint(0, 50, (30,)), torch.arange(start, start + 5).repeat(2)])
    token_loss: Any = TokenLoss.apply
    head = Head(weight, rows, start)
    losses = token_loss(hidden, rows, head, labels, softcap, range(0, 40, 7), 4 * 7 * 9)
    (losses * torch.arange(40)).sum().backward()

    exact, exact_rows = (t.detach().double().requires_grad_() for t in (hidden, rows))
    whole = torch.cat([weight[:start].double(), exact_rows, weight[start + 5 :].double()])
    scores = exact @ whole.T
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    wanted = nn.functional.cross_entropy(scores, labels, reduction="none")
    torch.autograd.backward((wanted * torch.arange(40)).sum())
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in ((hidden, exact), (rows, exact_rows)):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_a_new_token_is_one_token_wherever_its_text_stands(base_folder: Path) -> None:
    base = resolve_base(str(base_folder), None, GENES)
    tokenizer = load_tokenizer(base)
    ids = tokenizer("a<gene>b", add_special_tokens=False)["input_ids"]
    assert ids.count(new_ids(load_tokenizer(base), base)[0]) == 1
    assert tokenizer.decode(ids) == "a<gene>b"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<gene>b"
    assert load_config(base).vocab_size == len(tokenizer) == len(load_tokenizer(base.plain)) + 2


def test_rows_begin_as_the_mean_of_the_tokens_that_they_replace(base_folder: Path) -> None:
    base = resolve_base(str(base_folder), None, GENES)
    model: Any = load_model(base, "fp32", compute=CPU32).model
    pieces = load_tokenizer(base.plain)("<gene>", add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert len(layer.weight) == load_config(base).vocab_size
        row = layer.weight[new_ids(load_tokenizer(base), base)[0]]
        torch.testing.assert_close(row, layer.weight[pieces].mean(0))


def test_rows_that_the_base_has_to_spare_are_used_first(tmp_path: Path) -> None:
    base = resolve_base(str(make_base(tmp_path / "b", tied=True, spare_rows=9)), None, GENES)
    assert load_config(base).vocab_size == load_config(base.plain).vocab_size
    assert len(load_model(base, "fp32", compute=CPU32).model.get_input_embeddings().weight) == (
        load_config(base).vocab_size
    )


def test_a_base_with_new_tokens_is_another_base(base_folder: Path) -> None:
    base = resolve_base(str(base_folder), None, GENES)
    assert base.plain == resolve_base(str(base_folder))
    one = resolve_base(str(base_folder), None, GENES[:1])
    assert len({base.fingerprint, one.fingerprint, base.plain.fingerprint}) == 3


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_loss_and_gradients_are_those_of_peft_s_own_layers(
    base_folder: Path, tmp_path: Path, precision: Any
) -> None:
    _, model = adapted(base_folder, tmp_path, precision)
    base = resolve_base(str(base_folder), None, GENES)
    ids = new_ids(load_tokenizer(base), base)
    rows = [
        ([3, 4, ids[0], 5, 6, ids[1], 7], [-100, -100, ids[0], 5, 6, ids[1], 7]),
        ([3, 4, ids[0], 9, 6], [-100, 4, ids[0], 9, 6]),
    ]
    theirs = copy.deepcopy(model)
    for layer in row_layers(theirs):
        for patched in ("forward_adapters", "get_merged_weights"):
            del layer.__dict__[patched]
    wanted: Any = sum(
        nn.functional.cross_entropy(
            theirs(torch.tensor([row])).logits[0, :-1], torch.tensor(labels[1:]), reduction="sum"
        )
        for row, labels in rows
    )
    wanted.backward()
    whole = model(torch.tensor([rows[0][0]])).logits
    torch.testing.assert_close(whole, theirs(torch.tensor([rows[0][0]])).logits)
    assert add_token_loss(model.get_base_model()) == ""
    loss = model(layout=lay_out(rows, share=True))
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert sum("trainable_tokens" in name for name in trained) in (1, 2)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_saved_rows_are_those_in_memory_and_those_of_the_merge(
    base_folder: Path, tmp_path: Path
) -> None:
    loaded, model = adapted(base_folder, tmp_path)
    wanted = logits(model)
    save_adapter(model, loaded, tmp_path / "adapter", tmp_path)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    vocabulary = load_config(loaded.base).vocab_size
    assert all(vocabulary not in tensor.shape for tensor in saved.values())
    fresh = load_model(loaded.base, "nf4", compute=CPU32)
    again = load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), wanted)
    with again.disable_adapter():
        base = logits(again)
    torch.testing.assert_close(base, logits(load_model(loaded.base, "nf4", compute=CPU32).model))

    updates = read_updates(tmp_path / "adapter")
    tensors = dict(merged_tensors(model.get_base_model(), updates, torch.float32))
    plain = load_model(loaded.base, "fp32", compute=CPU32).model
    assert set(tensors) == {name for name, _ in plain.named_parameters()}
    plain.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_counts_the_rows_and_nothing_of_the_size_of_the_head(tied: bool) -> None:
    config = llama_config(5000, num_hidden_layers=4, tie_word_embeddings=tied)

    def step(num_new_tokens: int) -> TracedStep:
        model, speed = Model(name="x", precision="nf4"), Speed()
        options = (Adapter(r=4), speed, torch.float32, None)
        return TracedStep(config, model, *options, num_new_tokens)

    from test_plan_step import shape, sizes

    plain, new = step(0), step(3)
    assert new.num_trainable - plain.num_trainable == 3 * 64 * (1 if tied else 2)
    more = [sizes(new, shape())[phase] - size for phase, size in sizes(plain, shape()).items()]
    assert 0 <= max(more) < 5000 * 64 * 4 / 2


def rows_with(token: str) -> list[dict[str, str]]:
    return [
        {"prompt": f"{token} {n} of the heart", "completion": f"Heart {GENES[n % 2]} (I{n % 7})"}
        for n in range(40)
    ]


@pytest.fixture(scope="module")
def new_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A trained and merged run with new tokens, on the random Llama."""
    folder = tmp_path_factory.mktemp("new")
    train = {"eval_steps": 2, "save_steps": 2}
    data = {"new_tokens": list(GENES)}
    path = write_config(folder, tiny_llama, train=train, data=data)
    write_rows(folder / "train.jsonl", rows_with("diagnosis")[:32])
    write_rows(folder / "test.jsonl", rows_with("diagnosis")[32:])
    run_script("train/sft.py", path)
    run_script("train/merge.py", folder / "runs" / "tiny")
    return folder / "runs" / "tiny"


def test_a_run_keeps_rows_not_embeddings_and_merges_to_itself(new_run: Path) -> None:
    for step in (2, 4):
        checkpoint = new_run / "checkpoints" / f"checkpoint-{step}"
        weights = load_file(checkpoint / "adapter_model.safetensors")
        (rows,) = [tensor for name, tensor in weights.items() if "lora_" not in name]
        assert len(rows) == 2
    report = json.loads((new_run / "merged" / "merge_report.json").read_text())
    assert report["kept"]["kl_nats_per_token"] < 1e-5
    trained = read_trained_run(new_run)
    merged: Any = load_model(resolve_base(str(new_run / "merged")), "fp32", compute=CPU32).model
    ids = list(new_ids(trained.renderer.tokenizer, trained.base))
    begun: Any = load_model(trained.base, "fp32", compute=CPU32).model
    learnt = merged.get_input_embeddings().weight[ids]
    assert not torch.allclose(learnt, begun.get_input_embeddings().weight[ids], atol=1e-4)
    merged_tokenizer = load_tokenizer(resolve_base(str(new_run / "merged")))
    assert merged_tokenizer.convert_tokens_to_ids(list(GENES)) == ids


def test_a_stopped_run_goes_on_bit_for_bit(new_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(new_run, run)
    wanted = load_file(run / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    unfinish(run)
    run_script("train/sft.py", new_run.parent.parent / "tiny.yaml", f"runs_dir={tmp_path}")
    found = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_the_base_of_a_comparison_reads_new_tokens_as_text(new_run: Path) -> None:
    trained = read_trained_run(new_run)
    rows = held_out_rows(trained.folder, 4, 0)
    rendered = questions(rows, trained.renderer)
    comparison = Comparison(trained, trained.trained_compute(), rendered)
    lengths = {
        contender.name: [len(question.ids) for question in contender.questions]
        for contender in contenders(comparison)
    }
    assert lengths["adapter"] == lengths["merged"] == [len(q.ids) for q in rendered]
    for base in ("base-full", "base-nf4"):
        assert all(a > b for a, b in zip(lengths[base], lengths["adapter"], strict=True))


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train/export.py", ("--to", "adapter")),
        ("train/export.py", ("--to", "gguf", "--adapter-only")),
        ("eval/serve.py", ("--port", "0")),
    ],
)
def test_what_has_no_place_for_the_rows_is_refused(
    new_run: Path, script: str, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_script(script, new_run, *arguments)
    assert stop.value.code == 1
    assert "data.new_tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<|im_end|>"], "has the token '<|im_end|>' already"),
        (["<never>"], "the new token '<never>' is in no training row"),
    ],
)
def test_tokens_that_are_known_or_in_no_row_are_refused(
    tiny_llama: Path, tmp_path: Path, tokens: list[str], message: str, capsys: Any
) -> None:
    path = write_config(tmp_path, tiny_llama, data={"new_tokens": tokens})
    with pytest.raises(SystemExit) as stop:
        run_script("train/sft.py", path)
    assert stop.value.code == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tiny" / "adapter").exists()


@pytest.mark.parametrize("tokens", [["<a>", "<a>"], [" <a>"], [""]])
def test_odd_lists_of_tokens_are_refused(
    tiny_llama: Path, tmp_path: Path, tokens: list[str]
) -> None:
    path = write_config(tmp_path, tiny_llama, data={"new_tokens": tokens})
    with pytest.raises(ConfigError, match="new_tokens"):
        load_run(path, [])
