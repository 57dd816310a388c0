"""Open the app in a browser without showing its token to other users of the machine.

An address that a browser is started with can be seen by everybody in the list of processes. So it is started with a
file that only its owner may read, which leads to the address.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path

from logitlab.errors import InputError

OPEN_SECONDS = 20.0
"""How long the file stays for the browser to read it."""

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="referrer" content="no-referrer"><title>logitlab</title>
<script>location.replace({address})</script>
"""


class Doorway:
    """A file that leads to an address.

    Args:
        address: where to.

    Raises:
        InputError: the file cannot be written.

    Attributes:
        path: the file, for its owner alone.
    """

    def __init__(self, address: str) -> None:
        try:
            handle, name = tempfile.mkstemp(prefix="logitlab-", suffix=".html")  # 0600
            self.path = Path(name)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(_PAGE.format(address=json.dumps(address).replace("<", "\\u003c")))
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"--open needs a temporary file: {why}; leave it out, and open the address") from error
        self._timer = threading.Timer(OPEN_SECONDS, self.close)
        self._timer.daemon = True

    def open(self) -> None:
        """Let the user's browser open it, in the background; the file goes some seconds later."""
        import webbrowser

        threading.Thread(target=webbrowser.open, args=(self.path.as_uri(),), daemon=True).start()
        self._timer.start()

    def close(self) -> None:
        """Delete the file."""
        self._timer.cancel()
        self.path.unlink(missing_ok=True)
