"""Pages in Chromium, watched: whatever a page complains of, and whatever it asks of the network, fails the test.

A test module imports the fixtures that it uses, names them in its ``__all__``, and has ``pytestmark =
pytest.mark.browser``; where there is no Chromium its tests are skipped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium")
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for a module; not for the session, since no other test can start an event loop meanwhile."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *(["--no-sandbox"] if root else [])])
        yield chromium
        chromium.close()


@pytest.fixture
def open_tab(browser: Any) -> Iterator[Callable[..., Any]]:
    """``open_tab(viewport=..., color_scheme=..., permissions=...)`` is a new page (Playwright's) that is watched.

    Warnings and errors on the console, uncaught errors and requests to anywhere but files, data, blobs and the
    loopback fail the test in the end. What a test provokes it takes off ``tab.complaints``, a list of texts.
    """
    contexts: list[Any] = []
    complaints: list[str] = []

    def asked(route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in {"file", "data", "blob", "about"} or address.hostname in LOOPBACK:
            route.continue_()
        else:
            complaints.append(f"asked for {route.request.url}")
            route.abort()

    def said(message: Any) -> None:
        if message.type in {"error", "warning", "assert"}:
            complaints.append(f"{message.type}: {message.text}")

    def open_one(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(15_000)
        context.route("**/*", asked)
        tab = context.new_page()
        tab.on("console", said)
        tab.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
        tab.complaints = complaints
        return tab

    yield open_one
    for context in contexts:
        context.close()
    if complaints:
        pytest.fail("\n".join(["the page complained:", *complaints]))


@pytest.fixture
def tab(open_tab: Callable[..., Any]) -> Any:
    """A page of 1280 x 900 pixels; see `open_tab`."""
    return open_tab()


@pytest.fixture(scope="session")
def strict_document() -> Callable[..., str]:
    """``strict_document(script, data)``: a page that allows this module, and no style or markup of others.

    The data are there as JSON in the element with the id ``data``.
    """
    return _strict_document


def _strict_document(script: str, data: Any = None) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; img-src data:; require-trusted-types-for 'script'"
    held = json.dumps(data).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>host</title><link rel="icon" href="data:,">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<body><script type="application/json" id="data">{held}</script><script type="module">{script}</script>'
    )
