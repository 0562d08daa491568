"""Exports: proven artefacts of a real model cut to two layers, and every known way to a wrong one refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import LENIENT, edit_record, forget_digests, run_script

from halfbyte.errors import ModelError, RunError
from halfbyte.llamacpp import tools
from halfbyte.llamacpp.library import Opaque
from halfbyte.run_dir import RunDir
from halfbyte.ship import export as exporting
from halfbyte.trained.artefact import read_artefact

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("llama_cpp", "awq")]


@pytest.fixture
def run(merged_run: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "tiny"
    shutil.copytree(merged_run, copy)
    return copy


def report_of(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "export" / name / "export_report.json").read_text())  # type: ignore[no-any-return]


def test_files_are_the_trained_model(exported_run: Path) -> None:
    for name in ("gguf-f16", "gguf-q8_0", "gguf-q4_k_m"):
        report = report_of(exported_run, name)
        assert report["same_text"] == report["same_ids"] == report["conversations"] == 8
        assert set(report["scores"]) == {"exact_match"}
        assert (exported_run / "export" / name / "Modelfile").is_file()
        assert (
            exported_run / "export" / name / f"tiny-{name.removeprefix('gguf-')}.gguf"
        ).is_file()
    f16, q8, q4 = (report_of(exported_run, f"gguf-{q}") for q in ("f16", "q8_0", "q4_k_m"))
    assert f16["against_trained"]["kl_nats_per_token"] < 1e-3
    assert f16["against_merged"]["kl_nats_per_token"] < 1e-3
    assert f16["against_merged"]["top1_agreement"] > 0.99
    assert abs(f16["perplexity_change"]) < 0.005
    kls = [each["against_merged"]["kl_nats_per_token"] for each in (f16, q8, q4)]
    assert kls == sorted(kls)
    assert f16["bytes"] > q8["bytes"] > q4["bytes"]
    table = (exported_run / "export" / "export_report.md").read_text()
    assert table.count("\n| gguf-") == 3
    assert "\n| merged |" in table
    assert not list(exported_run.glob(".exporting*"))


def test_artefacts_are_variants_of_the_comparison(exported_run: Path) -> None:
    variants = "eval.variants=[adapter,merged,gguf-f16,gguf-q4_k_m]"
    run_script("eval/compare.py", exported_run, variants, "eval.opponents=[]")
    report = json.loads((exported_run / "eval" / "report.json").read_text())
    found = {each["name"]: each for each in report["variants"]}
    assert list(found) == ["adapter", "merged", "gguf-f16", "gguf-q4_k_m"]
    assert found["gguf-f16"]["held_out_loss"] == pytest.approx(
        found["merged"]["held_out_loss"], rel=1e-3
    )
    assert found["gguf-q4_k_m"]["weights_bytes"] < found["gguf-f16"]["weights_bytes"]


def test_answers_do_not_depend_on_what_was_asked_before(exported_run: Path) -> None:
    """What prompts share stays in the cache."""
    from halfbyte.llamacpp.model import GgufModel

    path = exported_run / "export" / "gguf-f16" / "tiny-f16.gguf"
    with GgufModel(path) as model:
        prompts = [
            model.tokenize(text) for text in ("one two three", "one two four", "five", "one")
        ]
        together = model.answers(prompts, stop_ids=[2], max_new_tokens=6)
        for prompt, answer in zip(prompts, together, strict=True):
            model._truncate_cache(0)
            assert model.answers([prompt], stop_ids=[2], max_new_tokens=6) == [answer]


def test_llama_cpp_s_own_server_renders_and_answers_the_same(
    exported_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its template engine is another than ours, and is what a served model is asked through."""
    import xllamacpp

    from halfbyte.llamacpp.model import GgufModel
    from halfbyte.ship.measured_run import MeasuredRun
    from halfbyte.trained.run import read_trained_run

    path = exported_run / "export" / "gguf-f16" / "tiny-f16.gguf"
    measured = MeasuredRun.of(read_trained_run(exported_run), 8)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.warmup = 512, False
    server = xllamacpp.Server(params)
    with GgufModel(path) as model:
        assert len(measured.conversations) == 8
        for row in measured.conversations:
            turns, _ = measured.turns(row)
            _, ids = measured.prompt(row)
            asked = {"messages": turns, "max_tokens": 6, "temperature": 0, "logprobs": True}
            made = server.handle_chat_completions(asked)
            assert made["usage"]["prompt_tokens"] == len(ids)
            (wanted,) = model.answers([ids], stop_ids=None, max_new_tokens=6)
            assert (
                made["choices"][0]["message"]["content"].strip() == model.decode(wanted.ids).strip()
            )


def test_layers_in_vram_need_a_build_that_knows_a_gpu(exported_run: Path) -> None:
    from halfbyte.llamacpp.library import library
    from halfbyte.llamacpp.model import GgufModel

    if library(tools.library_path()).llama_supports_gpu_offload():
        pytest.skip("this build knows a GPU")
    path = exported_run / "export" / "gguf-f16" / "tiny-f16.gguf"
    with pytest.raises(ModelError, match=r"10 layers should go into VRAM.*for the CPU only"):
        GgufModel(path, gpu_layers=10)


def test_gguf_in_llama_cpp_is_a_baseline_and_answers(
    exported_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported_run / "export" / "gguf-q8_0" / "tiny-q8_0.gguf"
    run_script(
        "eval/generate.py",
        path,
        "--engine",
        "llama.cpp",
        "--prompt",
        "one",
        "--max-new-tokens",
        "4",
    )
    assert re.search(r"tiny-q8_0.gguf: llama .* in llama.cpp", capsys.readouterr().out)
    given = f"[{{name: file, model: {path}, engine: llama.cpp}}]"
    run_script(
        "eval/compare.py",
        exported_run,
        "eval.variants=[adapter,gguf-q8_0]",
        f"eval.baselines={given}",
    )
    report = json.loads((exported_run / "eval" / "report.json").read_text())
    found = {each["name"]: each for each in report["variants"]}
    assert found["file"]["held_out_loss"] == pytest.approx(found["gguf-q8_0"]["held_out_loss"])


def test_push_without_a_login_is_refused_before_anything_is_made(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SystemExit):
        run_script("train/export.py", run, "--to", "adapter", "--push", "me/mine")
    assert "no login to the Hub is found. Run `hf auth login`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script("train/export.py", run, "--to", "adapter", "--push", "no name!")
    assert "no name of a repository on the Hub" in capsys.readouterr().err
    assert not (run / "export").exists()


@pytest.mark.slow
def test_awq_folder_is_made_and_read_back(run: Path) -> None:
    run_script(
        "train/export.py", run, "--to", "awq", "export.rows=4", "export.max_quantised_kl=20",
        "export.min_quantised_top1=0.001",
    )  # fmt: skip
    report = report_of(run, "awq")
    assert report["made"]["group_size"] == 64
    assert report["same_ids"] == report["conversations"] == 4
    run_script("eval/compare.py", run, "eval.variants=[merged,awq]")
    found = json.loads((run / "eval" / "report.json").read_text())["variants"]
    assert [each["name"] for each in found] == ["merged", "awq"]
    # Random weights would be far off: the checkpoint's own settings must be used.
    assert found[1]["held_out_loss"] < 1.5 * found[0]["held_out_loss"]


def test_long_rows_are_read_in_pieces(exported_run: Path) -> None:
    from halfbyte.llamacpp.model import GgufModel

    path = exported_run / "export" / "gguf-f16" / "tiny-f16.gguf"
    ids = list(range(100, 1400))
    with GgufModel(path) as model:
        whole = model.logits(ids, [0, 511, 512, 1299])
        again = model.logits(ids[:513], [511, 512])
        # Its f16 cache rounds; logits here reach 30.
        torch.testing.assert_close(again, whole[1:3], rtol=5e-3, atol=5e-2)
        assert whole.shape == (4, model.vocab_size)


@pytest.mark.slow
def test_adapter_alone(run: Path) -> None:
    run_script("train/export.py", run, "--to", "gguf", "--adapter-only", *LENIENT)
    report = report_of(run, "gguf-lora")
    assert report["against_trained"]["kl_nats_per_token"] < 1e-3
    run_script("train/export.py", run, "--to", "adapter", *LENIENT)
    report = report_of(run, "adapter")
    assert report["against_trained"]["kl_nats_per_token"] < 1e-6
    names = set(load_file(run / "export" / "adapter" / "adapter_model.safetensors"))
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in names)


@pytest.mark.slow
def test_artefact_that_is_another_model_is_refused_and_the_old_one_stays(
    exported_run: Path,
) -> None:
    before = report_of(exported_run, "gguf-q8_0")
    with pytest.raises(SystemExit):
        run_script(
            "train/export.py", exported_run, "--to", "gguf", "--quant", "q8_0",
            "export.rows=4", "export.max_quantised_kl=1e-9",
        )  # fmt: skip
    assert report_of(exported_run, "gguf-q8_0") == before
    assert not list(exported_run.glob(".exporting*"))


# --- sabotage ---

Sabotage = Callable[[Path], None]


def rename_keys(run: Path) -> None:
    path = run / "merged" / "model.safetensors"
    tensors = {name.replace("self_attn", "attn"): each for name, each in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def change_base(run: Path) -> None:
    path = run / "merged" / "merge_report.json"
    edit_record(path, base=json.loads(path.read_text())["base"] | {"fingerprint": "0" * 64})


def cut_file(run: Path) -> None:
    path = run / "merged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_template(run: Path) -> None:
    path = run / "merged" / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "model"))


def change_tokenizer(run: Path) -> None:
    path = run / "merged" / "tokenizer.json"
    content = json.loads(path.read_text())
    first, second = list(content["model"]["vocab"])[300:302]
    vocab = content["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))


def quantise_source(run: Path) -> None:
    path = run / "merged" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(config))


def adapt_tied_embedding(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 576)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.zeros(49152, 4)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("sabotage", "said"),
    [
        (rename_keys, "tensor names are not those of its architecture"),
        (change_base, "was merged into the base "),
        (cut_file, "damaged or cut short"),
        (change_template, "another chat template than the run was trained with"),
        (change_tokenizer, "another tokenizer than the run was trained with"),
        (quantise_source, r"is quantised already \(bitsandbytes\)"),
        (adapt_tied_embedding, "a LoRA on lm_head, which the base ties to one matrix"),
    ],
)
def test_sabotaged_run_is_refused_by_name(
    run: Path, sabotage: Sabotage, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sabotage(run)
    for digests in ("are there", "are not"):
        if digests == "are not":
            forget_digests(run)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            run_script("train/export.py", run, "--to", "gguf", "--quant", "f16")
    assert re.search(said, capsys.readouterr().err)
    assert not (run / "export").exists()
    assert not list(run.glob(".exporting*"))


def test_changed_weights_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        run_script("train/export.py", run, "--to", "gguf")
    assert "is not the file that the merge measured" in capsys.readouterr().err


def cut_gguf(folder: Path) -> None:
    (path,) = folder.glob("*.gguf")
    path.write_bytes(path.read_bytes()[:-100_000])


def flip_gguf(folder: Path) -> None:
    (path,) = folder.glob("*.gguf")
    content = bytearray(path.read_bytes())
    content[-50_000] ^= 1
    path.write_bytes(content)


def remove_gguf(folder: Path) -> None:
    (path,) = folder.glob("*.gguf")
    path.unlink()


@pytest.mark.parametrize("sabotage", [cut_gguf, flip_gguf, remove_gguf])
def test_sabotaged_artefact_is_refused(
    exported_run: Path, tmp_path: Path, sabotage: Sabotage
) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(exported_run, copy, ignore=shutil.ignore_patterns("merged", "checkpoints"))
    sabotage(copy / "export" / "gguf-q4_k_m")
    with pytest.raises(
        RunError, match=r"is not the file that was proven .* --to gguf --quant q4_k_m"
    ):
        read_artefact(RunDir(copy), "gguf-q4_k_m")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("base", "was made from the base "),
        ("chat_template_sha256", "made with another chat template"),
    ],
)
def test_artefact_of_another_run_is_refused(
    exported_run: Path, tmp_path: Path, key: str, said: str
) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(exported_run, copy, ignore=shutil.ignore_patterns("merged", "checkpoints"))
    path = copy / "export" / "gguf-f16" / "export_report.json"
    base = json.loads(path.read_text())["base"] | {"fingerprint": "0"}
    edit_record(path, **{key: base if key == "base" else "0"})
    with pytest.raises(RunError, match=said):
        read_artefact(RunDir(copy), "gguf-f16")


def test_proof_finds_another_template_and_other_weights(run: Path, exported_run: Path) -> None:
    """Even where every hash agrees, as in a file that was wrong from the beginning."""
    from halfbyte.llamacpp.model import GgufModel
    from halfbyte.ship.measured_run import MeasuredRun
    from halfbyte.ship.proof import prove, refuse_unproven
    from halfbyte.trained.run import read_trained_run

    trained = read_trained_run(run)
    settings, measured = trained.run, MeasuredRun.of(trained, 4)
    references = exporting._references(measured)
    good = exported_run / "export" / "gguf-f16" / "tiny-f16.gguf"
    content = good.read_bytes()
    bad = run / "bad.gguf"
    at = content.index(b"<|im_start|>assistant")
    bad.write_bytes(content[:at] + b"<|im_start|>assiztant" + content[at + 21 :])
    with GgufModel(bad) as engine:
        proof = prove(measured, engine, references, None)
    assert proof.same_text == 0
    with pytest.raises(RunError, match=r"chat template or tokenizer is another.*assiztant"):
        refuse_unproven("gguf-f16", proof, settings.export, lossless=True)
    spoilt = bytearray(content)
    spoilt[-400_000:-200_000] = spoilt[-800_000:-600_000]
    bad.write_bytes(spoilt)
    with GgufModel(bad) as engine:
        proof = prove(measured, engine, references, None)
    assert proof.same_ids == proof.conversations
    with pytest.raises(RunError, match=r"it is not the trained model: KL"):
        refuse_unproven("gguf-f16", proof, settings.export, lossless=True)


# --- bad input ---


def test_run_without_a_merge_names_the_command(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "merged")
    with pytest.raises(SystemExit):
        run_script("train/export.py", run, "--to", "gguf")
    assert f"Make it first: halfbyte merge {run}" in capsys.readouterr().err


def test_too_little_disk_is_said_before_anything_is_made(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "halfbyte.ship.export.shutil.disk_usage", lambda _: SimpleNamespace(free=10**6)
    )
    with pytest.raises(SystemExit):
        run_script("train/export.py", run, "--to", "gguf", "--quant", "f16", "q4_k_m")
    said = capsys.readouterr().err
    assert "the disk has" in said
    assert "gguf-f16, gguf-q4_k_m need" in said
    assert not list(run.glob(".exporting*"))


def test_unknown_type_names_the_known_ones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_script("train/export.py", run, "--to", "gguf", "--quant", "q9_z")
    assert "--quant q9_z: allowed are f32, f16, bf16, q8_0, q4_0" in capsys.readouterr().err


def test_without_any_quantiser_the_ways_are_named(
    exported_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "PREBUILT", {})
    monkeypatch.setattr(tools, "INSTALLED", dict.fromkeys(tools.INSTALLED, ()))
    monkeypatch.setenv("PATH", str(tmp_path))
    source = exported_run / "export" / "gguf-f16" / "tiny-f16.gguf"
    with pytest.raises(ModelError, match=r"no quantiser .* llama-quantize .* llama-cpp-python"):
        tools.quantise(source, tmp_path / "x.gguf", "q4_k_m")
    with pytest.raises(ModelError, match=r"llama\.cpp is needed here .* pip install xllamacpp"):
        tools.library_path()
    assert not list(tmp_path.iterdir())


def test_own_quantiser_on_the_path_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && cp "$1" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (tmp_path / "a.gguf").write_bytes(b"a")
    assert tools.quantise(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m") == str(program)
    assert (tmp_path / "b.gguf").read_bytes() == b"a"
    with pytest.raises(ModelError, match="could not quantise"):
        tools.quantise(tmp_path / "a.gguf", tmp_path / "b.gguf", "q5_k_m")


def test_build_with_another_layout_is_refused() -> None:
    settings = Opaque()
    with pytest.raises(ModelError, match=r"n_ctx is 0 by default, but \[512\] is expected"):
        settings.put("n_ctx", 0, {512}, 1)


@pytest.mark.slow
def test_tokenizer_that_the_converter_does_not_know(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "toy"
    shutil.copytree(trained_run, run)
    run_script("train/merge.py", run)
    with pytest.raises(SystemExit):
        run_script("train/export.py", run, "--to", "gguf", "--quant", "f16")
    said = capsys.readouterr().err
    assert "does not know this architecture or tokenizer" in said
    assert not list(run.glob(".exporting*"))
