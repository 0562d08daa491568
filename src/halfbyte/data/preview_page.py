"""Owns the preview as one HTML file: rows with what is learnt of them marked, and the ledger."""

from __future__ import annotations

from html import escape

from halfbyte.config.dataset import Data
from halfbyte.data.prepared import Prepared
from halfbyte.data.preview import faults_of, label_runs, row_title, show_ledger, show_lengths
from halfbyte.data.render import Renderer
from halfbyte.data.samples import Example

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color-scheme: light dark; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem; border-radius: .4rem;
  background: rgb(128 128 128 / .12); }
mark { background: rgb(60 170 90 / .3); color: inherit; }
h2 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
"""


def preview_page(prepared: Prepared, renderer: Renderer, data: Data, num_rows: int) -> str:
    """Return a page that needs no other file, with the first rows as they are learnt."""
    rows = [_row(example, renderer) for example in prepared.train[:num_rows]]
    faults = "".join(f"<li>{escape(fault)}</li>" for fault in faults_of(prepared, data))
    title = escape(", ".join(source.path for part, source in data.sources() if part == "train"))
    lengths = escape(show_lengths(prepared.full_lengths.tolist(), data.max_length))
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>Rows of {title}</title><style>{STYLE}</style>\n"
        f"<h1>Rows as they are learnt</h1><p>{title}; <mark>marked</mark> text is learnt.</p>\n"
        + (f"<h2>Faults</h2><ul>{faults}</ul>\n" if faults else "")
        + "\n".join(rows)
        + f"\n<h2>Lengths in tokens</h2><pre>{lengths}</pre>"
        f"\n<h2>Ledger</h2><pre>{escape(show_ledger(prepared))}</pre>\n</html>\n"
    )


def _row(example: Example, renderer: Renderer) -> str:
    parts = []
    for supervised, ids in label_runs(example.encoded.ids, example.encoded.labels):
        text = escape(str(renderer.tokenizer.decode(ids, skip_special_tokens=False)))
        parts.append(f"<mark>{text}</mark>" if supervised else text)
    return f"<h2>{escape(row_title(example))}</h2><pre dir=auto>{''.join(parts)}</pre>"
