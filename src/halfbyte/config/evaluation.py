"""Owns every key of ``eval``: the models to compare, the rows and metrics, and the confidence."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from halfbyte.config.section import (
    OPPONENTS,
    Count,
    Metric,
    Name,
    Opponent,
    Positive,
    Precision,
    Section,
    Variant,
)


class Baseline(Section):
    """A further model that the comparison measures."""

    name: Name = Field(description="Name of the variant in the report.")
    model: Name = Field(description="As `model.name`.")
    revision: Name | None = Field(None, description="As `model.revision`.")
    precision: Precision | None = Field(
        None,
        description="As `model.precision`. Default: the stored precision if it is quantised (AWQ), else"
        " unquantised, in the run's compute dtype.",
    )
    engine: Literal["transformers", "llama.cpp"] = Field(
        "transformers", description="`llama.cpp`: for a `.gguf` file, which is used unchanged."
    )
    gpu_layers: Annotated[int, Field(ge=-1)] = Field(
        0, description="Layers in VRAM with llama.cpp; the rest stay in RAM. -1: all."
    )
    fewshot: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="Training examples in its prompts."
    )
    chat_template: Name | None = Field(
        None, description="As `data.chat_template`, for a model without its own."
    )


class Benchmark(Section):
    """A standard benchmark, named by its task in lm-evaluation-harness."""

    task: Name = Field(description="Task, such as `mmlu`, `gsm8k`, `humaneval`, `truthfulqa_mc2`.")
    limit: Positive | None = Field(
        None, description="Number of questions, drawn from the task with the run's seed; null: all."
    )
    fewshot: Count | None = Field(
        None, description="Examples in the prompt; null: the task's own number."
    )
    max_new_tokens: Positive | None = Field(
        None, description="Longest answer, for tasks that generate; null: the task's own."
    )
    metric: Name | None = Field(
        None,
        description="Deciding `metric` or `metric,filter`, such as `exact_match,flexible-extract`;"
        " null: the task's first.",
    )


class Judge(Section):
    """A model that compares answers, behind any OpenAI-compatible endpoint."""

    url: Name = Field(
        description="URL up to `/v1`. The key, if needed, is read from HALFBYTE_JUDGE_KEY."
    )
    model: Name = Field(description="Name of the model at that endpoint.")
    rows: Positive = Field(100, description="Rows to judge, the first ones of the comparison.")
    question: Name = Field(
        "Which answer is better: more correct, more complete, and no longer than it needs to be?",
        description="Question that the judge answers about two answers.",
    )


class Eval(Section):
    """The comparison with the full-size baseline."""

    variants: list[Variant] = Field(
        default=["base-full", "base-full-fewshot", "base-nf4", "adapter", "merged"],
        description="Variants to compare, on the same prompts with the same decoding. Artefacts of"
        " halfbyte export are also allowed by name, such as `awq` or `gguf-q4_k_m`.",
    )
    opponents: list[Opponent] | None = Field(
        None,
        description="Opponents, each where it applies; null: all within `max_opponent_growth`. Without a model: the most frequent training answer, a vote of the"
        " training rows with the most similar words, logistic regression (where answers are a closed set), the"
        " likeliest span of the prompt (where answers are such spans). With the base: the most similar training rows"
        " as examples, the answers of a closed set ranked by likelihood, the set or the JSON Schema in the prompt with"
        " constrained decoding. Without `base-full` or `base-full-fewshot` in `variants`, those with the base take part"
        " only where they are named here.",
    )
    max_opponent_growth: Annotated[float, Field(gt=0)] | None = Field(
        2.25,
        description="An opponent with the base reads at most so many times the tokens of the rows: `base-full-retrieval`"
        " shows fewer examples, one that still reads more is left out with a note, and so is `base-full-instructed` where"
        " it would read more with the others. No limit if null, or where `opponents` names them.",
    )
    baselines: list[Baseline] = Field(
        default_factory=list,
        description="Further models to compare: `{name, model, revision, precision, engine, gpu_layers,"
        " fewshot, chat_template}`.",
    )
    metrics: Annotated[list[Metric], Field(min_length=1)] = Field(
        default=["exact_match"],
        description="`exact_match` (the same text in NFC, but for outer white space); `normalised_match` (ignores"
        " case, spaces and punctuation without meaning); `numeric_match` (the one number that an answer gives); `field_match` (share of equal JSON fields); `schema_valid`"
        " (JSON that conforms to `eval.json_schema`); `tool_match` (the wanted calls, in any order) and `tool_valid`"
        " (calls that keep to the tools of their row), which come first where rows call tools and this key is left at its"
        " default; `chrf` and `bleu` (sacreBLEU); `rouge_l`;"
        " `held_out_loss` (always measured; the only one for raw text). The first decides the verdict.",
    )
    json_schema: Name | None = Field(
        None, description="File with the JSON Schema that `schema_valid` checks answers against."
    )
    answer_pattern: Name | None = Field(
        None,
        description="Regular expression with one group: `exact_match` compares its last match"
        " instead of the whole answer.",
    )
    benchmarks: list[Benchmark] = Field(
        default_factory=list,
        description="General benchmarks for every variant, to show what the training cost: `{task, limit,"
        " fewshot, max_new_tokens, metric}`. Needs `halfbyte[bench]`.",
    )
    benchmark_data: Name | None = Field(
        None,
        description="Folder with the benchmarks' datasets under their Hub ids (`cais/mmlu`,"
        " `openai/gsm8k`), used instead of the Hub. null: from the Hub.",
    )
    benchmark_chat: bool = Field(
        False, description="Render the benchmarks' prompts with the chat template."
    )
    run_code: bool = Field(
        False,
        description="Allow benchmarks that run code written by the model, such as `humaneval`; each"
        " program runs in its own process without files, network or other processes (Linux).",
    )
    rows: Positive = Field(200, description="Held-out rows, the same for every variant.")
    fewshot: Annotated[int, Field(ge=1, le=64)] = Field(
        5, description="Training examples in the prompt of `base-full-fewshot`."
    )
    max_new_tokens: Positive = Field(64, description="Longest answer, in tokens.")
    batch_size: Positive = Field(
        16,
        description="Rows per batch when answers are generated in padded batches; scoring passes use"
        " a quarter of it. With generation in slots, memory limits the number of answers instead.",
    )
    judge: Judge | None = Field(
        None,
        description="`{url, model, rows, question}`: a model that judges which of two answers is"
        " better, twice with their places swapped. Rows and answers are sent to it; null: no judge.",
    )
    watts: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Power in watts to assume if the hardware does not measure its energy (NVML on"
        " GPUs, RAPL on Intel and AMD CPUs); null: no energy is reported in that case.",
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.95,
        description="Level of the intervals: BCa bootstrap over rows, paired for differences; Wilson's for"
        " scores of 0 and 1.",
    )
    resamples: Annotated[int, Field(ge=200)] = Field(5000, description="Bootstrap resamples.")

    @property
    def allowed_opponents(self) -> tuple[Opponent, ...]:
        """The opponents that take part where they apply."""
        return OPPONENTS if self.opponents is None else tuple(self.opponents)
