"""Take the README's picture: the page of the demo reading in headless Chromium.

Run: make demo && python tools/screenshot.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--hide-scrollbars",
]


def main() -> None:
    """Write docs/images/page.png."""
    chromium = shutil.which("chromium")
    page = Path("demo/france.html").resolve()
    if chromium is None or not page.is_file():
        sys.exit("needs chromium and demo/france.html (make demo)")
    out = Path("docs/images/page.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                chromium,
                *FLAGS,
                f"--user-data-dir={profile}",
                "--window-size=1100,890",
                "--virtual-time-budget=3000",
                f"--screenshot={out.resolve()}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
        )
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
