"""The pictures of the docs, from a run that was compared and, for its page, a real browser.

python docs/pictures.py runs/quickstart

report_phone.png and report_desktop.png: its eval/report.html, as Chromium shows it.
wandb_view.png: the panels of the saved view, drawn with matplotlib from what the run recorded. The view
itself needs W&B online; which panels there are, and what each shows, is read from its definition.
"""

from __future__ import annotations

import argparse
import shutil
import warnings
from pathlib import Path
from typing import Any

from halfbyte.config import read_run_folder
from halfbyte.errors import exit_on_user_error

DOCS = Path(__file__).parent
SIZES = {"phone": (390, 1300), "desktop": (1280, 1600)}
COLUMNS = 3


def main() -> None:
    """Run folder → three pictures beside this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    folder = parser.parse_args().run.resolve()
    draw_view(folder)
    photograph(folder / "eval" / "report.html")


def photograph(report: Path) -> None:
    """The beginning of the report at two widths."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(report.as_uri())
            page.screenshot(path=DOCS / f"report_{name}.png")


def draw_view(folder: Path) -> None:
    """Every panel of the saved view but its tables and its page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from halfbyte.eval.dashboard import summary, workspace
    from halfbyte.eval.report_record import Report
    from halfbyte.run_dir import RunDir, read_jsonl
    from halfbyte.trained.manifest import finished_manifest

    report = Report.read(folder / "eval" / "report.json")
    manifest = finished_manifest(RunDir(folder))
    recorded = list(read_jsonl(folder / "metrics.jsonl"))
    values = {**summary(report), **_flat("memory", manifest.memory)}
    names = [entry["name"] for entry in report.variants]
    project = read_run_folder(folder).track.project
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        view = workspace("", project, names, report.metric)
    panels = [panel for section in view.sections for panel in section.panels]
    drawn = [panel for panel in panels if hasattr(panel, "y") or hasattr(panel, "metrics")]
    rows = -(-len(drawn) // COLUMNS)
    figure, grid = pyplot.subplots(
        rows, COLUMNS, figsize=(13, 3.1 * rows), squeeze=False, layout="constrained"
    )
    for axes, panel in zip(grid.flat, drawn, strict=False):
        axes.set_title(panel.title, fontsize=9)
        if hasattr(panel, "y"):
            for key in panel.y:
                points = [(row["step"], row[key]) for row in recorded if key in row]
                axes.plot(*zip(*points, strict=True), label=key)
            axes.set_xlabel("step")
            axes.legend(fontsize=8)
        else:
            axes.barh(panel.metrics, [values[key] for key in panel.metrics], color="#0f766e")
            axes.tick_params(axis="y", labelsize=7)
    for axes in list(grid.flat)[len(drawn) :]:
        axes.axis("off")
    figure.savefig(DOCS / "wandb_view.png", dpi=80)


def _flat(name: str, told: Any) -> dict[str, Any]:
    """As W&B names what is nested."""
    if not isinstance(told, dict):
        return {name: told}
    return {key: value for own in told for key, value in _flat(f"{name}.{own}", told[own]).items()}


if __name__ == "__main__":
    exit_on_user_error(main)
