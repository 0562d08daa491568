"""Owns the medical-coding dataset: diagnoses in words to the title and code of their ICD-10-CM category.

The tables are the US CDC's (public domain), as shipped in the package simple-icd-10-cm. Training
rows are official descriptions; test rows are inclusion terms, other wordings of the same diagnoses,
none of which is a training prompt.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from halfbyte.data.normal import normalised
from halfbyte.errors import DataError
from halfbyte.run_dir import write_json, write_jsonl

PACKAGE = "simple-icd-10-cm"
VERSION = "1.5.0"
CIRCULATORY = "9"  # chapter IX, I00-I99


def build_icd10(folder: Path, chapter: str = CIRCULATORY) -> dict[str, int]:
    """Write train.jsonl, test.jsonl and card.json into ``folder`` and return the counts.

    The same package version gives the same bytes.

    Raises:
        DataError: the package is missing or of another version, or there is no such chapter.
    """
    try:
        installed = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        installed = "nothing"
    if installed != VERSION:
        raise DataError(
            f"{PACKAGE} {VERSION} is needed, found {installed}: pip install {PACKAGE}=={VERSION}"
        )
    import simple_icd_10_cm as icd

    if not icd.is_valid_item(chapter) or not icd.is_chapter(chapter):
        raise DataError(f"chapter {chapter!r}: ICD-10-CM has the chapters 1 to 22")
    codes = [code for code in icd.get_descendants(chapter) if not icd.is_block(code)]
    answers = {code: _answer(icd.get_description(code[:3]), code[:3]) for code in codes}
    train = [{"prompt": icd.get_description(code), "completion": answers[code]} for code in codes]
    train_prompts = {normalised(row["prompt"]) for row in train}
    terms: dict[str, list[tuple[str, str]]] = {}
    num_terms = 0
    for code in codes:
        for term in icd.get_inclusion_term(code):
            num_terms += 1
            terms.setdefault(normalised(term), []).append((term, answers[code]))
    test = [
        {"prompt": uses[0][0], "completion": uses[0][1]}
        for key, uses in terms.items()
        if key not in train_prompts and len({answer for _, answer in uses}) == 1
    ]
    counts = {
        "descriptions": len(train),
        "categories": len(set(answers.values())),
        "inclusion_terms": num_terms,
        "test": len(test),
        "left_out_repeated_or_in_training_or_ambiguous": num_terms - len(test),
    }
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)
    source = f"{PACKAGE} {VERSION} (MIT); tables: US CDC, ICD-10-CM April 2026, public domain"
    write_json(folder / "card.json", {"source": source, "chapter": chapter, "counts": counts})
    return counts


def _answer(title: str, code: str) -> str:
    # The title comes first: a small model must name the diagnosis before it can recall its code.
    return f"{title} ({code})"
