"""Owns the trial: a few real steps on a small random model, in a process and a folder of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from halfbyte.doctor.checks import OK, WRONG, Check
from halfbyte.errors import last_line

LIMIT_S = 120
STEPS = 4
ROWS = [
    {"prompt": f"Which number follows {number}?", "completion": f"{number + 1}"}
    for number in range(64)
]


def try_training() -> Check:
    """Train a random model of two small layers in 4 bits, and return what became of it."""
    name = "training"
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="halfbyte-trial-") as scratch:
        config = _write_run(Path(scratch))
        command = [sys.executable, "-m", "halfbyte", "train", str(config)]
        environ = os.environ | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environ, timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return Check(name, WRONG, f"{STEPS} steps of a tiny model took more than {LIMIT_S} s")
        if done.returncode:
            return Check(name, WRONG, f"a tiny model cannot be trained: {last_line(done.stderr)}")
        lines = (Path(scratch) / "runs/trial/metrics.jsonl").read_text(encoding="utf-8")
        losses = [loss for line in lines.splitlines() if (loss := json.loads(line).get("loss"))]
    seconds = time.monotonic() - begun
    if not losses[-1] < losses[0]:
        shown = " → ".join(f"{loss:.3f}" for loss in losses)
        return Check(name, WRONG, f"a tiny model does not learn: its loss is {shown}")
    text = f"{STEPS} steps of a tiny 4-bit model in {seconds:.0f} s, loss {losses[0]:.2f} → {losses[-1]:.2f}"
    return Check(name, OK, text)


def _write_run(folder: Path) -> Path:
    """Write model, rows and config of the trial; return the config."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from halfbyte.data.chat_template import load_template

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([row["prompt"] for row in ROWS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=load_template("chatml"),
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **ends))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    settings = {
        "name": "trial",
        "runs_dir": "runs",
        "model": {"name": "model"},
        "data": {"train": "rows.jsonl", "test_frac": 0.2, "cache": False},
        "train": {
            "learning_rate": 1e-2,
            "max_steps": STEPS,
            "log_steps": 1,
            "num_samples": 0,
            "warmup_frac": 0.0,
        },
        "track": {"wandb": "off"},
    }
    config = folder / "trial.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML 1.2
    return config
