"""Owns every key of ``eval``: what is compared, on what, and how sure it must be."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from halfbyte.config.section import Count, Metric, Name, Positive, Precision, Section, Variant


class Baseline(Section):
    """A further model that the comparison measures."""

    name: Name = Field(description="Name of the variant in the report.")
    model: Name = Field(description="As `model.name`.")
    revision: Name | None = Field(None, description="As `model.revision`.")
    precision: Precision | None = Field(
        None,
        description="As `model.precision`. Default: as stored if that is quantised (AWQ), else"
        " unquantised, in the run's compute dtype.",
    )
    engine: Literal["transformers", "llama.cpp"] = Field(
        "transformers", description="`llama.cpp`: for a `.gguf` file, which stays as it is."
    )
    gpu_layers: Annotated[int, Field(ge=-1)] = Field(
        0, description="Layers in VRAM with llama.cpp, the rest in RAM; -1: all."
    )
    fewshot: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="Training examples in its prompts."
    )
    chat_template: Name | None = Field(
        None, description="As `data.chat_template`; for a model that has none of its own."
    )


class Benchmark(Section):
    """A standard benchmark: a task of lm-evaluation-harness, by its name there."""

    task: Name = Field(description="Such as `mmlu`, `gsm8k`, `humaneval`, `truthfulqa_mc2`.")
    limit: Positive | None = Field(
        None, description="Questions, drawn with the run's seed from all of the task's; null: all."
    )
    fewshot: Count | None = Field(
        None, description="Examples in the prompt; null: the task's own number."
    )
    max_new_tokens: Positive | None = Field(
        None, description="Longest answer, for tasks that generate; null: the task's own."
    )
    metric: Name | None = Field(
        None,
        description="`metric` or `metric,filter` that decides, such as `exact_match,flexible-extract`;"
        " null: the task's first.",
    )


class Judge(Section):
    """A model that compares answers, behind any OpenAI-compatible endpoint."""

    url: Name = Field(
        description="Up to `/v1`. Its key, if it needs one, is in HALFBYTE_JUDGE_KEY."
    )
    model: Name = Field(description="Its name there.")
    rows: Positive = Field(100, description="Rows that are judged, the first of the comparison's.")
    question: Name = Field(
        "Which answer is better: more correct, more complete, and no longer than it needs to be?",
        description="What it is asked of two answers.",
    )


class Eval(Section):
    """The comparison with the full-size baseline."""

    variants: list[Variant] = Field(
        default=["base-full", "base-full-fewshot", "base-nf4", "adapter", "merged"],
        description="What is compared, on the same prompts with the same decoding. Also artefacts of"
        " train/export.py by their names: `awq`, `gguf-q4_k_m` and the like.",
    )
    baselines: list[Baseline] = Field(
        default_factory=list,
        description="Further models: `{name, model, revision, precision, engine, gpu_layers, fewshot,"
        " chat_template}`.",
    )
    metrics: Annotated[list[Metric], Field(min_length=1)] = Field(
        default=["exact_match"],
        description="`exact_match`; `normalised_match` (case, punctuation and spaces aside);"
        " `numeric_match` (the last number); `field_match` (share of equal JSON fields); `schema_valid`"
        " (JSON that keeps to `eval.json_schema`); `chrf` and `bleu` (sacreBLEU); `rouge_l`;"
        " `held_out_loss` (always measured; the only one for raw text). The first decides the verdict.",
    )
    json_schema: Name | None = Field(
        None, description="File with the JSON Schema that `schema_valid` holds answers to."
    )
    answer_pattern: Name | None = Field(
        None,
        description="Regular expression with one group: `exact_match` compares its last match"
        " instead of the whole answer.",
    )
    benchmarks: list[Benchmark] = Field(
        default_factory=list,
        description="What else every variant is asked, to show what the training cost: `{task, limit,"
        " fewshot, max_new_tokens, metric}`. Needs `halfbyte[bench]`.",
    )
    benchmark_data: Name | None = Field(
        None,
        description="Folder with the benchmarks' datasets under their Hub ids (`cais/mmlu`, `openai/gsm8k`);"
        " then the Hub is not asked. null: from the Hub.",
    )
    benchmark_chat: bool = Field(
        False, description="Put the benchmarks' prompts through the chat template."
    )
    run_code: bool = Field(
        False,
        description="Allow benchmarks that run what the model wrote, such as `humaneval`: each program in a"
        " process of its own without files, network or other processes (Linux).",
    )
    rows: Positive = Field(200, description="Held-out rows, the same for every variant.")
    fewshot: Annotated[int, Field(ge=1, le=64)] = Field(
        5, description="Training examples in the prompt of `base-full-fewshot`."
    )
    max_new_tokens: Positive = Field(64, description="Longest answer, in tokens.")
    batch_size: Positive = Field(
        16,
        description="Rows at once where answers are generated in padded batches; in passes that score, a quarter"
        " of them. Answers that grow in slots are as many as memory has room for.",
    )
    judge: Judge | None = Field(
        None,
        description="`{url, model, rows, question}`: a model that says which of two answers is better, asked twice"
        " with their places swapped. Sends rows and answers there; null: nobody.",
    )
    watts: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Power to reckon with where the hardware does not count its energy (NVML on GPUs, RAPL on"
        " Intel and AMD CPUs); null: then no energy is told.",
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.95,
        description="Level of the intervals: BCa bootstrap over rows, paired for differences; Wilson's for"
        " scores of 0 and 1.",
    )
    resamples: Annotated[int, Field(ge=200)] = Field(5000, description="Bootstrap resamples.")
