"""Run the application: a socket, uvicorn, and an end that does not wait for the models."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import uvicorn

from logitlab.errors import InputError
from logitlab.server.app import Server
from logitlab.server.connections import CONNECTIONS, Connection, quiet
from logitlab.server.doorway import Doorway
from logitlab.server.settings import Settings

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

LAST_SECONDS = 1.0
"""How long the end waits for answers to go out, and then for the worker."""


def listening(host: str, port: int, *, remote: bool = False) -> socket.socket:
    """A socket that listens.

    Args:
        host: a name or an address of this machine.
        port: its port; 0 for any that is free.
        remote: whether other machines may reach it.

    Raises:
        InputError: there is no such address, other machines would reach it and must not, or the port is in use.
    """
    try:
        family, kind, proto, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host!r} is no address of this machine: {error}") from error
    if not remote and not ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback:
        raise InputError(
            f"--host {host!r} can be reached from other machines, and the connection is not encrypted: give "
            "--allow-remote if that is meant, or keep 127.0.0.1 and use an SSH tunnel"
        )
    found = socket.socket(family, kind, proto)
    try:
        if os.name == "posix":  # elsewhere it would let two programs have one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
        found.listen(128)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is in use: give another one with --port, or --port 0 for any") from error
        why = error.strerror or error
        raise InputError(f"cannot listen at {host}, port {port}: {why}; give another --host or --port") from error
    return found


class _Uvicorn(uvicorn.Server):
    """Ends work before it waits for the connections that wait for it."""

    def __init__(self, config: uvicorn.Config, end: Callable[[], Any]) -> None:
        super().__init__(config)
        self._end = end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take connections."""
        asyncio.get_running_loop().set_exception_handler(quiet)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all work, then the connections."""
        self._end()
        await super().shutdown(sockets)


def uvicorn_of(server: Server, end: Callable[[], Any] | None = None) -> uvicorn.Server:
    """What runs an application, on a socket that is given to its ``run``.

    Args:
        server: the application.
        end: what to call at the end besides, before the connections are closed.
    """

    class Bounded(Connection):
        most = CONNECTIONS + server.settings.limits.waiting

    def ending() -> None:
        server.close()
        if end is not None:
            end()

    config = uvicorn.Config(
        server.asgi,
        loop="asyncio",
        http=Bounded,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # the address with the token must not be in a log
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=int(LAST_SECONDS),
    )
    return _Uvicorn(config, ending)


def serve(settings: Settings, found: socket.socket, *, browser: bool = False) -> None:
    """Serve until Ctrl-C, which ends the process; prints one line, the address.

    Args:
        settings: what to serve; the port is taken from the socket.
        found: the socket, listening.
        browser: whether to open the address in a browser.

    Raises:
        InputError: a lens, a file of vectors or the history cannot be used.
    """
    tell = _telling()
    settings = replace(settings, port=int(found.getsockname()[1]))
    with found:
        server = Server(settings)
        door = Doorway(settings.entrance) if browser else None
        try:
            print(settings.entrance, flush=True)
            if (
                ipaddress.ip_address(str(found.getsockname()[0]).partition("%")[0]).is_unspecified
                and not settings.hosts
            ):
                tell("browsers of other machines are refused: name with --allow-host what they call this machine")
            tell(f"loading {settings.models[0].name}")
            server.preload()
            if door is not None:
                door.open()
            uvicorn_of(server, None if door is None else door.close).run(sockets=[found])
        except KeyboardInterrupt:
            if door is not None:
                door.close()
            server.close(LAST_SECONDS)
            tell("stopped")
            sys.stdout.flush()
            sys.stderr.flush()
            # The worker may be inside of a model, which cannot be interrupted; and taking Python apart takes long.
            os._exit(INTERRUPTED)
        finally:
            if door is not None:
                door.close()
            server.close()


def _telling() -> Callable[[str], None]:
    """Let the server's log and its messages go to standard error, a line each."""
    log = logging.getLogger("logitlab.server")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("logitlab: %(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO)
    return log.info
