"""The command ``serve``."""

from __future__ import annotations

import os
import re
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logitlab.cli.app import app
from logitlab.cli.options import (
    AnyWeights,
    Device,
    DeviceMap,
    Dtype,
    Offload,
    Pickle,
    Placed,
    Quantize,
    Remote,
    StackName,
    load,
)
from logitlab.errors import InputError

if TYPE_CHECKING:
    from logitlab.models.handle import Model

_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,200}")
_NAME = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")


@app.command()
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="'default', a fetched name, a hub id, a folder, a .gguf file; repeat."),
    ] = None,
    lens: Annotated[
        list[str] | None, typer.Option("--lens", "-l", help="A fitted lens that may be used beside 'logit'; repeat.")
    ] = None,
    vectors: Annotated[
        list[str] | None, typer.Option("--vectors", help="A file of vectors that may be used; repeat.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8765,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let --host be an address that other machines reach.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="A name that browsers may use for this machine, NAME or NAME:PORT; repeat."),
    ] = None,
    history: Annotated[
        Path | None, typer.Option(help="Folder for past requests (~/.local/state/logitlab/history).")
    ] = None,
    no_history: Annotated[bool, typer.Option("--no-history", help="Keep no requests.")] = False,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=500_000,
            help="Longest prompt, in tokens. 25 characters a token, and a reading at 81 sites, are let in with it.",
        ),
    ] = 4096,
    max_waiting: Annotated[int, typer.Option(min=1, max=1000, help="Requests that may wait.")] = 8,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the address in a browser.")] = False,
    any_weights: AnyWeights = False,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: Offload = None,
    quantize: Quantize = None,
    stack: StackName = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
) -> None:
    """Start the app: read, compare, patch and steer in a browser on this machine.

    Prints its address, with a token that nobody else knows (or that of LOGITLAB_TOKEN). Ctrl-C ends it.

    Example: logitlab serve --lens tuned-lens --port 0
    """
    lacking = next((name for name in ("fastapi", "uvicorn") if find_spec(name) is None), None)
    if lacking is not None:
        raise InputError(f"the app needs {lacking}: pip install 'logitlab[app]'")
    if history is not None and no_history:
        raise InputError("--history and --no-history exclude each other")
    strange = next((name for name in allow_host or () if not _NAME.fullmatch(name)), None)
    if strange is not None:
        raise InputError(f"--allow-host {strange!r} is no name: give NAME or NAME:PORT, without http://")
    placed = Placed(device, device_map, offload_folder, quantize)
    given = placed.options() | {"dtype": None if dtype == "auto" else dtype, "stack": stack}
    given |= {"allow_pickle": allow_pickle or None, "trust_remote_code": trust_remote_code or None}
    shown = {name: value for name, value in given.items() if value is not None and name != "offload_folder"}

    def loaded(place: str, say: Any) -> Model:
        return load(place, dtype, placed, stack, allow_pickle, trust_remote_code, say)

    from logitlab.server.history import default_folder
    from logitlab.server.serve import listening
    from logitlab.server.serve import serve as run
    from logitlab.server.settings import LOGIT, Limits, Settings, named

    token = _token()
    found = listening(host, port, remote=allow_remote)
    settings = Settings(
        models=named(model or ["default"]),
        lenses=named([one for one in lens or [] if one != LOGIT], reserved=[LOGIT]),  # that one is always there
        vectors=named(vectors or []),
        host=host,
        token=token,
        hosts=tuple(allow_host or ()),
        limits=Limits.of(max_tokens, waiting=max_waiting),
        history=None if no_history else history or default_folder(),
        load=loaded,
        options=shown,
        any_weights=any_weights,
        allow_pickle=allow_pickle,
    )
    run(settings, found, browser=open_browser)


def _token() -> str:
    """The token of LOGITLAB_TOKEN, else a new one."""
    given = os.environ.get("LOGITLAB_TOKEN")
    if given is None:
        return secrets.token_urlsafe(32)
    if not _TOKEN.fullmatch(given):
        raise InputError(
            "LOGITLAB_TOKEN must be 16 to 200 letters, digits, - and _: unset it for a token made at random"
        )
    return given
