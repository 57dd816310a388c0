"""Who may ask the server for anything. Everything goes through here before anything else looks at it.

* The header Host must name this server, so that a page of another name that resolves to this machine (DNS rebinding)
  gets nothing.
* A page of another origin gets nothing: Origin, where there is one, must be ours, and what browsers say about where a
  request comes from (Sec-Fetch-Site) must not be another site. No header allows cross-origin requests.
* Whoever asks for more than the files of the page must know the token, and send it as a bearer. It is no cookie:
  browsers send cookies to every port of a machine, whoever listens there. The printed address has it behind the ``#``,
  which no browser sends; the page keeps it in a storage that belongs to its origin, port included.
"""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from logitlab.server.settings import FAILED, Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

METHODS = ("GET", "HEAD", "POST", "DELETE")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy: nothing from elsewhere, no inline code, no frames around it."""

HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
"""On every answer."""

_LOG = logging.getLogger("logitlab.server")


class Guard:
    """The application behind the checks.

    Args:
        app: what answers requests that may be made.
        settings: the token and the addresses.
    """

    def __init__(self, app: App, settings: Settings) -> None:
        self.app = app
        self.token = settings.token.encode()
        self.hosts = frozenset(settings.addresses)
        self.foreign = frozenset(name.lower() for name in settings.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket
            await send({"type": "websocket.close", "code": 1008})
            return
        begun = False

        async def guarded(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                ours = {name for name, _ in HEADERS}
                theirs = [(k, v) for k, v in message.get("headers", ()) if k.lower() not in ours]
                message = {**message, "headers": [*theirs, *HEADERS]}
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await _say(guarded, *refusal)
            elif not _open(scope) and not self._known(scope):
                await _say(
                    guarded, 401, "the token is missing or wrong: open the address that logitlab serve has printed"
                )
            else:
                await self.app(scope, receive, guarded)
        except Exception:
            _LOG.exception("a request failed")
            if not begun:
                await _say(guarded, 500, FAILED)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Why a request is not answered whoever makes it: status and message."""
        hosts = _values(scope, b"host")
        if len(hosts) != 1:
            return 400, "the request names no host, or several"
        host = hosts[0].lower()
        if host not in self.hosts:
            return 421, "this server does not go by that name; start it with --allow-host if it should"
        for origin in _values(scope, b"origin"):
            scheme, _, place = origin.lower().partition("://")
            if place != host or scheme not in (("http", "https") if self._proxied(host) else ("http",)):
                return 403, "requests of other pages are refused"
        entering = scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
        if not entering and any(site in ("cross-site", "same-site") for site in _values(scope, b"sec-fetch-site")):
            return 403, "requests of other pages are refused"
        if scope["method"] not in METHODS:
            return 405, f"the method {scope['method'][:20]} is not known here"
        return None

    def _proxied(self, host: str) -> bool:
        """Whether something that speaks TLS may stand between: names from --allow-host."""
        return host in self.foreign or host.rpartition(":")[0] in self.foreign

    def _known(self, scope: Scope) -> bool:
        for value in _values(scope, b"authorization"):
            scheme, _, given = value.partition(" ")
            if scheme.lower() == "bearer" and self._right(given.strip()):
                return True
        return False

    def _right(self, given: str) -> bool:
        """Whether this is the token, in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token)


def _open(scope: Scope) -> bool:
    """Whether anybody may have this: the files of the page, which hold no secret."""
    path: str = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path == "/" or path.startswith("/static/"))


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key.lower() == name]


async def _say(send: Send, status: int, message: str) -> None:
    body = json.dumps({"message": message}).encode() + b"\n"
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
