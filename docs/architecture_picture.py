"""Draw docs/architecture.svg from the code, and list every module in docs/architecture.md.

The picture has layers, packages with their modules, and two ways through them.

python docs/architecture_picture.py [--check]    (--check: only say whether the picture is up to date)

Layers are those of docs/architecture.md, which tests/test_layout.py holds against the imports. A step of a
way that is not in the code is an error.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path
from xml.sax.saxutils import escape

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "src" / "halfbyte"
PICTURE, PAGE = DOCS / "architecture.svg", DOCS / "architecture.md"
INDEX = "## Every module\n"  # the rest of the page is written here
# Module and function of each step, and what it hands on.
ROW = [
    ("data/sources.py", "open_table", "rows as stored"),
    ("data/rows.py", "parse", "conversations"),
    ("data/encoding.py", "encode_rows", "ids and labels"),
    ("data/prepare.py", "prepare", "rows and ledger"),
    ("train/setup.py", "set_up", "base, adapter, plan"),
    ("train/batching.py", "step", "passes of a step"),
    ("data/prefix_tree.py", "lay_out", "a prefix tree"),
    ("forward/packed.py", "add_token_loss", "hidden states"),
    ("forward/loss.py", "head_losses", "losses, gradients"),
    ("train/trainer.py", "training_step", "one optimizer step"),
]
RUN_FOLDER = [
    ("train/session.py", "open_session", "run.yaml"),
    ("train/session.py", "record_data", "ledger.json, data/"),
    ("train/session.py", "write_manifest", "manifest.json"),
    ("train/session.py", "save_trained", "adapter/"),
    ("trained/run.py", "read_trained_run", "TrainedRun"),
    ("ship/merge.py", "merge", "merged/"),
    ("ship/export.py", "export", "export/NAME/"),
    ("eval/compare.py", "compare", "eval/report.json"),
    ("serve/loading.py", "open_models", "a server"),
]
WIDTH, MARGIN, GAP, LINE, PAD = 1180, 16, 8, 14, 8
BAND, BOX, INK, SOFT, ACCENT = "#f1f5f9", "#ffffff", "#1f2933", "#64748b", "#0f766e"
STEP_WIDTH, STEP_HEIGHT = 220, 50


def main() -> None:
    """Code → docs/architecture.svg."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    arguments = parser.parse_args()
    for path, wanted in ((PICTURE, draw()), (PAGE, with_modules(PAGE.read_text("utf-8")))):
        if path.is_file() and path.read_text(encoding="utf-8") == wanted:
            continue
        if arguments.check:
            sys.exit(f"{path}: is stale; run python docs/architecture_picture.py")
        path.write_text(wanted, encoding="utf-8")
        print(f"wrote {path}")


def draw() -> str:
    """Return the picture as SVG."""
    parts: list[str] = []
    y = MARGIN
    for group in layers():
        y = _band(parts, group, y)
    for title, way in (("The way of a row", ROW), ("The way of a run folder", RUN_FOLDER)):
        y = _way(parts, title, way, y)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}"'
        ' font-family="system-ui, sans-serif" font-size="12">'
    )
    return "\n".join(
        [head, f'<rect width="{WIDTH}" height="{y}" fill="white"/>', *parts, "</svg>\n"]
    )


def with_modules(page: str) -> str:
    """Return the page with the first sentence of every module at its end."""
    lines = [page.partition(INDEX)[0] + INDEX]
    for part in (part for group in layers() for part in group):
        paths = sorted((PACKAGE / part).glob("*.py")) or [PACKAGE / f"{part}.py"]
        lines.append(f"\n### {part}\n" if len(paths) > 1 else "")
        for path in paths:
            if path.stem != "__init__":
                lines.append(f"- `{path.relative_to(PACKAGE)}`: {_sentence(path)}")
    return "\n".join(lines) + "\n"


def _sentence(path: Path) -> str:
    """Return what a module owns, from its docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].removeprefix("Owns ")


def layers() -> list[list[str]]:
    """Return the groups of parts of docs/architecture.md, from the top down."""
    text = PAGE.read_text(encoding="utf-8")
    line = re.search(r"`(__main__ > [^`]*)`", text)
    assert line, "docs/architecture.md has no line of layers"
    return [group.split(", ") for group in line[1].split(" > ")]


def modules(part: str) -> list[str]:
    """Return the modules of a package; a part that is one file has none."""
    return sorted(path.stem for path in (PACKAGE / part).glob("*.py") if path.stem != "__init__")


def _band(parts: list[str], group: list[str], y: int) -> int:
    """Draw the boxes of a layer side by side; return where the next layer begins."""
    width = (WIDTH - 2 * MARGIN - (len(group) + 1) * GAP) // len(group)
    columns = max(1, width // 130)
    lines = max(-(-len(modules(part)) // columns) for part in group)
    height = 2 * PAD + LINE * (1 + lines) + (4 if lines else 0)
    bottom = height + 2 * GAP
    parts.append(_rect(MARGIN, y, WIDTH - 2 * MARGIN, bottom, BAND))
    for number, part in enumerate(group):
        x = MARGIN + GAP + number * (width + GAP)
        parts.append(_rect(x, y + GAP, width, height, BOX))
        name = part if modules(part) else f"{part}.py"
        parts.append(_text(x + PAD, y + GAP + PAD + 10, name, ACCENT, bold=True))
        for index, module in enumerate(modules(part)):
            at_x = x + PAD + index % columns * ((width - 2 * PAD) // columns)
            at_y = y + GAP + PAD + 14 + LINE * (1 + index // columns)
            parts.append(_text(at_x, at_y, module, INK))
    return y + bottom + GAP


def _way(parts: list[str], title: str, way: list[tuple[str, str, str]], y: int) -> int:
    """Draw the steps of a way, row by row; return where the next begins."""
    parts.append(_text(MARGIN, y + 22, title, ACCENT, bold=True))
    y += 32
    a_row = (WIDTH - 2 * MARGIN + GAP) // (STEP_WIDTH + GAP)
    for number, (path, function, result) in enumerate(way):
        _check(path, function)
        x = MARGIN + number % a_row * (STEP_WIDTH + GAP)
        top = y + number // a_row * (STEP_HEIGHT + GAP)
        parts.append(_rect(x, top, STEP_WIDTH, STEP_HEIGHT, BAND))
        parts.append(_text(x + PAD, top + 20, f"{number + 1}. {function}", INK, bold=True))
        parts.append(_text(x + PAD, top + 38, f"{path} → {result}", SOFT, size=10))
    return y + -(-len(way) // a_row) * (STEP_HEIGHT + GAP) + MARGIN


def _check(path: str, function: str) -> None:
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert function in names, f"{path} has no function {function}"


def _rect(x: int, y: int, width: int, height: int, fill: str) -> str:
    size = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<rect {size} rx="6" fill="{fill}" stroke="#cbd5e1"/>'


def _text(x: int, y: int, text: str, fill: str, *, bold: bool = False, size: int = 12) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{fill}" font-size="{size}"{weight}>{escape(text)}</text>'


if __name__ == "__main__":
    main()
