"""Beside its pages `mkdocs build` makes the live grid of the gallery, from a saved reading, by the code as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from logitlab.reading import Reading

SAVED = Path(__file__).parents[1] / "docs" / "images" / "gallery" / "france.parquet"


def on_post_build(config: Any) -> None:
    """Write images/gallery/grid.html into the site."""
    Reading.load(SAVED).html(Path(config["site_dir"]) / "images" / "gallery" / "grid.html")
