"""A Reading as one interactive HTML file that loads nothing, and as a frame for notebooks.

The page is a shell around the lens grid (lens_grid.js): its data as JSON in a script element that does not run
(grid_data.py says what is in it), the module's own text, and a line that puts the one into the other.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from logitlab.reading import Reading
from logitlab.views import pictures
from logitlab.views.grid_data import grid_data


def page(reading: Reading) -> str:
    """One self-contained HTML document; it makes no network request and runs no other script.

    Args:
        reading: the table.

    Example:
        ``Path("page.html").write_text(page(reading), encoding="utf-8")``, which ``reading.html("page.html")`` does.
    """
    return _document(grid_data(reading))


def embedded(reading: Reading) -> str:
    """The page in a sandboxed frame, for notebooks; the frame may save what its Copy menu makes, and nothing else."""
    pictured = any(prompt.pictures for prompt in reading.prompts) or pictures.is_detector(reading)
    height = 920 if pictured else min(300 + 23 * len(reading.sites), 860)
    source = html.escape(page(reading), quote=True)
    return (
        f'<iframe srcdoc="{source}" sandbox="allow-scripts allow-downloads" title="logitlab reading" loading="lazy" '
        f'style="width:100%;height:{height}px;border:0;border-radius:8px"></iframe>'
    )


def lens_grid_path() -> Path:
    """Where the module of the grid is, for whoever serves it as a file."""
    return Path(__file__).with_name("lens_grid.js")


@cache
def module_text() -> str:
    """The module of the grid: the same text in a page, in the notebook widget and in the app."""
    return lens_grid_path().read_text(encoding="utf-8")


def _document(data: dict[str, Any]) -> str:
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # Inside JSON these characters occur only in strings, where an escape means the same.
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    filled = {
        "policy": _policy(),
        "title": html.escape(f"{data['model']}: logitlab"),
        "data": text,
        "module": module_text(),
    }
    return "".join(filled[part] if i % 2 else part for i, part in enumerate(_template()))


@cache
def _template() -> list[str]:
    """The shell: text at even places, names of what goes between at odd ones."""
    text = resources.files("logitlab.views").joinpath("page.html").read_text(encoding="utf-8")
    return re.split(r"\{\{(\w+)\}\}", text)


@cache
def _policy() -> str:
    """A content security policy that allows this page's own style and script and nothing else."""
    text = "".join(module_text() if part == "module" else part for part in _template())
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    script = re.search(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    assert style is not None
    assert script is not None
    allowed = f"style-src {_hash(style[1])}; script-src {_hash(script[1])}; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
