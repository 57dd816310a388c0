"""Connections: only so many at once, and none that is held open without asking for anything."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 128
"""Connections at once, beside those of requests that wait."""

HEADER_SECONDS = 15.0
"""How long the headers of a request may take: from the connection on, or from their first byte on a used one."""

_BODY = b'{"message": "the server has too many connections; try again"}\n'
_FULL = b"\r\n".join(
    (
        b"HTTP/1.1 503 Service Unavailable",
        b"content-type: application/json",
        b"content-length: %d" % len(_BODY),
        b"retry-after: 2",
        b"connection: close",
        b"",
        _BODY,
    )
)
_LOG = logging.getLogger("logitlab.server")


class Connection(H11Protocol):
    """One connection of uvicorn's, which may be refused, and is closed when no request comes.

    Attributes:
        most: connections at once.
    """

    most: ClassVar[int] = CONNECTIONS
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take the connection, or refuse it."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(_FULL)
            transport.close()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Let the time run while no request is at work."""
        cycle: Any = self.cycle  # None before the first request
        if cycle is not None and not cycle.response_complete:
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def quiet(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a loop does with errors that nobody has caught: one line where no connection can be taken."""
    error = context.get("exception")
    if isinstance(error, OSError) and "accept" in str(context.get("message", "")):
        _LOG.warning("no connection can be taken for now: %s", error.strerror or error)
    else:
        loop.default_exception_handler(context)
