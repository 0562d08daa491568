"""How fast the comparison measures a variant: against a loop that asks one row after the other.

python benchmarks/eval_speed.py runs/quickstart --out benchmarks/results/eval_speed_cpu_smollm2

The loop is what a first evaluation script does: for each row ``model.generate`` on its prompt, then a
forward pass with labels for its loss, with transformers alone. Both are timed in one sitting; the loop on
``--loop-rows`` of the rows, since it is slow. Answers must be the same, or part where the plain model is not
sure itself: where its two likeliest tokens are nearer to each other than twice what its logits change when
it reads the same text in two pieces, at most over the rows that part. In bf16 that is often so.

How fast a measurement can be at all depends on the machine: told beside it is what its linear layers
alone would take at the rate of one large product, timed in the same sitting.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.config import read_run_folder
from halfbyte.errors import RunError, exit_on_user_error

RATE_ROUNDS = 20


def main() -> None:
    """Run folder → seconds a row, both ways, for the base and the adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--loop-rows", type=int, default=60)
    parser.add_argument(
        "--compute-dtype", choices=["fp32", "bf16", "fp16"], help="default: as the run was trained"
    )
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    arguments = parser.parse_args()
    run = read_run_folder(arguments.run, [f"eval.rows={arguments.rows}"])

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.data.questions import held_out_rows, questions
    from halfbyte.eval.measure import measure
    from halfbyte.eval.variants import Comparison, contenders
    from halfbyte.model.precision import NAMES, choose_compute
    from halfbyte.trained.run import read_trained_run

    settings = run.eval.model_copy(update={"variants": ["base-full", "adapter"], "baselines": []})
    run = run.model_copy(update={"eval": settings})
    trained = read_trained_run(arguments.run, run)
    rows = held_out_rows(trained.folder, run.eval.rows, run.seed)
    dtype = arguments.compute_dtype
    compute = choose_compute(dtype) if dtype else trained.trained_compute()
    found = {}
    comparison = Comparison(trained, compute, questions(rows, trained.renderer))
    for contender in contenders(comparison):
        loop_s, answers = _loop(contender, arguments.loop_rows, run.eval.max_new_tokens)
        start = time.perf_counter()
        variant = measure(contender, run)
        ours_s = time.perf_counter() - start
        flops = _flops(contender, run, arguments.loop_rows)
        model: Any = contender.model
        dtype = model.get_input_embeddings().weight.dtype
        num_parted, others = _parted(contender, answers, variant.answers)
        found[contender.name] = {
            "rows": len(rows),
            "seconds": ours_s,
            "seconds_a_row": ours_s / len(rows),
            "loop_rows": len(answers),
            "loop_seconds_a_row": loop_s / len(answers),
            "ratio": loop_s / len(answers) / (ours_s / len(rows)),
            "dtype": NAMES[dtype],
            "gflop_a_row": flops / 1e9,
            "gflop_per_s": (rate := _best_rate(contender.device, dtype)) / 1e9,
            "products_seconds": flops * len(rows) / rate,
            "answer_tokens": sum(variant.lengths),
            "same_answers": len(answers) - num_parted,
            "parted_at_near_ties": num_parted - len(others),
        }
        print(contender.name, json.dumps(found[contender.name]), flush=True)
        if others:
            raise RunError(f"{contender.name}: {len(others)} answers are others: {others[:3]}")
        del contender
    if arguments.out:
        _write(arguments.out, found)


def _loop(contender: Any, num_rows: int, max_new_tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds and answers' ids of the plain loop over the first rows."""
    import torch
    from transformers import GenerationConfig

    model, renderer = contender.model, contender.renderer
    decoding = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=renderer.stop_ids,
        pad_token_id=renderer.pad_id,
    )
    model.eval()
    answers = []
    start = time.perf_counter()
    with torch.no_grad():
        for question in contender.questions[:num_rows]:
            prompt, ids, labels = (
                torch.tensor([numbers], device=contender.device)
                for numbers in (question.prompt, question.ids, question.labels)
            )
            made = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=decoding,
            )[0, prompt.shape[1] :].tolist()
            model(input_ids=ids, labels=labels)
            stops = [at for at, token in enumerate(made) if token in renderer.stop_ids]
            answers.append(made[: stops[0]] if stops else made)
    return time.perf_counter() - start, answers


def _parted(contender: Any, answers: list[list[int]], texts: list[str]) -> tuple[int, list[str]]:
    """How many of our answers leave the loop's, and which where the plain model is sure of the next token."""
    decode = contender.renderer.decode
    parted = []
    for question, ids, text in zip(contender.questions, answers, texts, strict=False):
        if decode(ids) != text:
            shared = [n for n in range(len(ids) + 1) if text.startswith(decode(ids[:n]))]
            # Texts lose the blanks at their ends, so that they may have parted a little earlier.
            places = [n for n in shared if decode(ids[:n]) == decode(ids[: shared[-1]])]
            found = [_lead(contender, [*question.prompt, *ids[:n]]) for n in places]
            lead, noise = min(found)
            parted.append((lead, noise, f"{question.row.place} token {places[-1]}"))
    unsure = 2 * max((noise for _, noise, _ in parted), default=0.0)
    sure = [f"{place}: ahead by {lead:.3f}" for lead, _, place in parted if lead > unsure]
    return len(parted), sure


def _lead(contender: Any, text: list[int]) -> tuple[float, float]:
    """How far the likeliest next token's logit is ahead, and how far logits change by reading in pieces."""
    import torch

    ids, half = torch.tensor([text], device=contender.device), len(text) // 2
    with torch.no_grad():
        whole = contender.model(input_ids=ids, use_cache=False).logits[0, -1].float()
        held = contender.model(input_ids=ids[:, :half], use_cache=True).past_key_values
        pieces = contender.model(input_ids=ids[:, half:], past_key_values=held).logits[0, -1]
    first, second = whole.topk(2)[0].tolist()
    return first - second, float((whole - pieces.float()).abs().max())


def _flops(contender: Any, run: Any, num_rows: int) -> float:
    """Operations of the linear layers for a row, counted by torch on some of the rows."""
    from torch.utils.flop_counter import FlopCounterMode

    from halfbyte.eval.measure import measure

    some = contender.questions[:num_rows]
    with FlopCounterMode(display=False) as counter:
        measure(replace(contender, questions=some), run)
    return float(counter.get_total_flops()) / len(some)


def _best_rate(device: Any, dtype: Any) -> float:
    """Operations a second of a product of 1,024 rows, the best of some."""
    import torch

    x, weight = (torch.randn(size, 2048, device=device, dtype=dtype) for size in (1024, 2048))
    best = float("inf")
    for _ in range(RATE_ROUNDS):
        start = time.perf_counter()
        float(torch.nn.functional.linear(x, weight)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * x.numel() * weight.shape[0] / best


def _write(out: Path, found: dict[str, Any]) -> None:
    from halfbyte.model.precision import device_name
    from halfbyte.run_dir import provenance

    out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/eval_speed.py", *sys.argv[1:]])
    told = {"command": command, "device": device_name(), **provenance()}
    out.with_suffix(".json").write_text(json.dumps({**told, "variants": found}, indent=1) + "\n")
    lines = [
        "| variant | rows | halfbyte | its linear layers alone | one row after the other | faster |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, told in found.items():
        lines.append(
            f"| {name} | {told['rows']} | {told['seconds']:.0f} s, {told['seconds_a_row']:.3f} s a row |"
            f" {told['products_seconds']:.0f} s at {told['gflop_per_s']:.0f} GFLOP/s in {told['dtype']} |"
            f" {told['loop_seconds_a_row']:.3f} s a row ({told['loop_rows']} rows) | {told['ratio']:.1f}x |"
        )
    out.with_suffix(".md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    exit_on_user_error(main)
