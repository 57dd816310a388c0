"""Write what a run of a study has found as a page of the documentation.

Run: make studies, or python tools/study_page.py FOLDER [--tables summary constructed]
"""

from __future__ import annotations

import argparse
import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from logitlab.studies import find

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Read the folder, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tables", nargs="*", default=[])
    options = parser.parse_args()
    manifest: dict[str, Any] = json.loads((options.folder / "manifest.json").read_text())
    study = find(manifest["study"])
    images = DOCS / "images" / "studies"
    images.mkdir(parents=True, exist_ok=True)
    model = manifest["model"]
    command = f"logitlab study run {study.name} --scale {manifest['scale']}"
    seconds = sum(unit["seconds"] for step in manifest["steps"].values() for unit in step["units"])
    session = manifest["sessions"][-1]
    day = datetime.fromisoformat(manifest["ended"]).date()
    lines = [
        f"# Study: {study.title}",
        "",
        f"{study.paper}. This page is written by `make studies`; it is what `{command}` found on {model['name']} "
        f"({model['layers']} layers of width {model['width']}, {model['dtype']}) on {day}, seed {manifest['seed']}, in "
        f"{seconds / 60:.0f} minutes on {session['processors']} cores.",
        "",
        study.summary,
        "",
        f"Data: {study.data}",
        "",
        "## Claims",
        "",
        "| claim | paper | ours, 95 % interval | test | verdict |",
        "|---|---|---|---|---|",
    ]
    for claim in manifest["claims"]:
        ours = "–"
        if claim["value"] is not None:
            ours = f"{claim['value']:.3g} [{claim['low']:.3g}, {claim['high']:.3g}], n = {claim['n']}"
        test = f"{claim['test']}; {claim['side']} {claim['threshold']:g}"
        verdict = f"**{claim['verdict']}**" + (f" ({claim['note']})" if claim["note"] else "")
        lines.append("| " + " | ".join(map(cell, (claim["statement"], claim["paper"], ours, test, verdict))) + " |")
    lines += ["", "## Figures", ""]
    for picture in study.pictures:
        name = f"{study.name}-{picture.name}.png"
        shutil.copyfile(options.folder / "figures" / f"{picture.name}.png", images / name)
        lines += [f"![{picture.name}](images/studies/{name})", "", picture.caption, ""]
    for name in options.tables:
        table = pd.read_parquet(options.folder / "tables" / f"{name}.parquet")
        lines += [f"## Table: {name}", "", *markdown(table), ""]
    lines += ["## What it does otherwise than the source", "", *(f"* {defect}" for defect in study.defects), ""]
    page = DOCS / f"{study.name}.md"
    page.write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {page}")


def markdown(table: pd.DataFrame) -> list[str]:
    """A table, numbers with three digits."""
    shown = table.drop(columns=["unit"], errors="ignore")
    rows = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in shown.itertuples(index=False)]
    head = [str(c).replace("_", " ") for c in shown.columns]
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(cell, line)) + " |" for line in lines]


def cell(text: str) -> str:
    """Text that is safe in a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
