"""Owns the preview of prepared data: coloured tokens, lengths, shares, duplicates, ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from halfbyte.config.dataset import Data
from halfbyte.data.encoded import IGNORED
from halfbyte.data.ledger import Ledger, SourceLedger
from halfbyte.data.prepared import Prepared, empty_shares
from halfbyte.data.render import Renderer
from halfbyte.data.samples import Example

GREEN, GREY, RESET = "\x1b[32m", "\x1b[90m", "\x1b[0m"
BAR_WIDTH = 40
NUM_BINS = 10


def show_row(example: Example, renderer: Renderer, *, colour: bool) -> str:
    """Return a row as the model sees it, supervised tokens in green, or in ‹ › without colour."""
    parts = []
    encoded = example.encoded
    for supervised, ids in label_runs(encoded.ids, encoded.labels):
        text = renderer.tokenizer.decode(ids, skip_special_tokens=False)
        if colour:
            parts.append(f"{GREEN if supervised else GREY}{text}{RESET}")
        else:
            parts.append(f"‹{text}›" if supervised else str(text))
    return f"{row_title(example)}\n{''.join(parts)}"


def row_title(example: Example) -> str:
    """Return a row's place, its number of tokens, and its weight if that is not 1."""
    encoded, weight = example.encoded, example.row.weight
    title = f"{encoded.place}: {len(encoded.ids)} tokens, {encoded.num_supervised} supervised"
    return title if weight == 1 else f"{title}, weight {weight:g}"


def label_runs(ids: list[int], labels: list[int]) -> Iterator[tuple[bool, list[int]]]:
    """Yield runs of ids that are all supervised or all not, each with whether it is."""
    start = 0
    for end in range(1, len(ids) + 1):
        supervised = labels[start] != IGNORED
        if end == len(ids) or (labels[end] != IGNORED) != supervised:
            yield supervised, ids[start:end]
            start = end


def show_lengths(lengths: Sequence[int], max_length: int) -> str:
    """Return a histogram of row lengths in tokens, and what ``max_length`` would cut."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // NUM_BINS))
    bins = [0] * NUM_BINS
    for length in lengths:
        bins[(length - low) // width] += 1
    lines = [
        f"{low + k * width:>7}-{low + (k + 1) * width - 1:<7}{count:>7}  "
        + "█" * round(BAR_WIDTH * count / max(bins))
        for k, count in enumerate(bins)
        if low + k * width <= high
    ]
    ordered = sorted(lengths)
    median, percentile_99 = ordered[len(ordered) // 2], ordered[int(0.99 * (len(ordered) - 1))]
    num_overlong = sum(length > max_length for length in lengths)
    num_excess = sum(max(0, length - max_length) for length in lengths)
    lines.append(f"median {median}, 99 % {percentile_99}, longest {high} tokens")
    lines.append(f"max_length {max_length} would cut {num_overlong} rows, {num_excess} tokens")
    return "\n".join(lines)


def show_ledger(prepared: Prepared) -> str:
    """Return the ledger as text: rows in = trained + held out + dropped, and other facts of the data."""
    ledger = prepared.ledger
    held_out = ", ".join(f"{count} {name}" for name, count in ledger.held_out.items())
    dropped = ", ".join(f"{count} {reason}" for reason, count in ledger.dropped.items()) or "0"
    rows_in = " + ".join(f"{count} {name}" for name, count in ledger.rows_in.items())
    lines = [
        "format: " + ", ".join(f"{name} is {kind}" for name, kind in prepared.formats.items()),
        f"rows in: {rows_in} = {ledger.trained} trained + held out ({held_out}) + dropped ({dropped})",
        f"truncated: {ledger.total('truncated')}; changed by the template:"
        f" {ledger.total('changed_by_template')}; special tokens as text:"
        f" {ledger.total('special_token_text')}",
        f"repeated prompts: {ledger.duplicate_prompts_in_training} in training,"
        f" {ledger.duplicate_prompts_held_out} held out; near duplicates of held-out prompts:"
        f" {ledger.total('near_duplicates')}",
    ]
    lines += [_source_line(name, source) for name, source in ledger.sources.items()]
    for name, tokens in ledger.tokens.items():
        if tokens.total:
            share = 100 * tokens.supervised / tokens.total
            lines.append(f"{name}: {tokens.total} tokens, {share:.1f} % supervised")
    return "\n".join(lines + _particulars(ledger))


def _source_line(name: str, source: SourceLedger) -> str:
    """Return what became of the rows of one of several sources."""
    held_out = ", ".join(f"{count} {part}" for part, count in source.held_out.items())
    dropped = ", ".join(f"{count} {reason}" for reason, count in source.dropped.items()) or "0"
    line = (
        f"{name}: {source.rows_in} rows = {source.trained} trained + held out ({held_out}) + dropped"
        f" ({dropped})"
    )
    if source.weight != 1:
        line += f"; weight {source.weight:g}, {source.samples} samples"
    return line


def _particulars(ledger: Ledger) -> list[str]:
    """Return lines on what not every dataset has: dropped rows, ignored keys, repairs, samples, weights."""
    lines = [
        f"dropped, {reason}: {', '.join(places)}"
        + (" …" if ledger.dropped[reason] > len(places) else "")
        for reason, places in ledger.dropped_places.items()
    ]
    for title, counts in (
        ("ignored", ledger.ignored),
        ("repaired", ledger.repaired),
        ("samples, by weights of sources or answers without earlier thoughts", ledger.samples),
        ("dropped samples of rows that stay", ledger.dropped_samples),
    ):
        if counts:
            lines.append(
                f"{title}: {', '.join(f'{name} {count:,}' for name, count in counts.items())}"
            )
    if ledger.weighted:
        lines.append(f"rows with a weight other than 1: {ledger.weighted}")
    if ledger.split_by == "answer":
        lines.append("all rows have one prompt: those held out are chosen by their answers")
    return lines


def faults_of(prepared: Prepared, data: Data) -> list[str]:
    """Return what is wrong with a dataset, as ``halfbyte preview --check`` counts it."""
    ledger = prepared.ledger
    faults = [
        f"{count} rows: {reason}"
        for reason, count in ledger.dropped.items()
        if reason != "weight 0" and not reason.startswith("not drawn")
    ]
    lengths = (prepared.full_lengths, prepared.validation.sizes, prepared.test.sizes)
    overlong = sum(int((sizes > data.max_length).sum()) for sizes in lengths)
    if overlong:
        faults.append(f"{overlong} rows: longer than data.max_length {data.max_length}")
    return faults + empty_shares(prepared, data)


def show_preview(
    prepared: Prepared, renderer: Renderer, data: Data, num_rows: int, *, colour: bool
) -> str:
    """Return everything that ``halfbyte preview`` prints."""
    rows = [show_row(example, renderer, colour=colour) for example in prepared.train[:num_rows]]
    near = [
        f"  {pair.jaccard:.2f}  {pair.train}  ~  {pair.held_out}"
        for pair in prepared.ledger.near_duplicates[:5]
    ]
    shares = "".join(f"\nnote: {line}" for line in empty_shares(prepared, data))
    return "\n\n".join(
        [
            *rows,
            "LENGTHS (tokens)\n" + show_lengths(prepared.full_lengths.tolist(), data.max_length),
            "LEDGER\n" + show_ledger(prepared) + "".join(f"\n{line}" for line in near) + shares,
            show_tokens(renderer),
        ]
    )


def show_tokens(renderer: Renderer) -> str:
    """Return a line on BOS and stop tokens, and on which of several chat templates is used."""
    bos = "exactly 1 in each row" if renderer.has_bos else "none (the tokenizer adds none)"
    stops = renderer.tokenizer.convert_ids_to_tokens(renderer.stop_ids)
    names = renderer.template_names
    named = f"; chat template: default, of {', '.join(names)}" if names else ""
    return f"BOS: {bos}; stop tokens: {', '.join(map(str, stops))}{named}"
