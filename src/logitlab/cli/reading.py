"""Commands that read: ``read``, ``compare`` and ``show``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logitlab.cli.app import app
from logitlab.cli.options import (
    STATISTICS,
    AnyWeights,
    Device,
    DeviceMap,
    Dtype,
    LensNames,
    ModelName,
    Offload,
    Pickle,
    Placed,
    Precision,
    Quantize,
    Remote,
    StackName,
    Width,
    check_figure,
    check_output,
    lens_of,
    load,
    prompts_of,
    statistics_of,
    status,
    target_of,
    titled,
)
from logitlab.errors import InputError

if TYPE_CHECKING:
    from logitlab.reading import Reading


@app.command()
def read(
    text: Annotated[list[str] | None, typer.Argument(help="Prompts. Without any, standard input is read.")] = None,
    model: ModelName = "default",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a text file.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of the file or input is a prompt.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="Token to follow; repeat for several. id:N for an id.")
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option("--sites", "-s", help="For instance resid, mlp_out, 12.attn_out, ::4.resid_post, 3.head_out."),
    ] = None,
    positions: Annotated[
        str | None, typer.Option("--positions", "-p", help="Tokens to read: 3, -1, 0,5,-1 or a slice such as 2:8.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="Most likely tokens kept in each cell.")] = 5,
    statistics: Annotated[
        str, typer.Option(help="What else to compute in each cell: entropy,kl (the default), one of them, or none.")
    ] = ",".join(STATISTICS),
    precision: Annotated[
        Precision, typer.Option(help="exact; screened (to 0.001 nats, quicker); auto (whichever is quicker).")
    ] = Precision.EXACT,
    lens: Annotated[
        str, typer.Option("--lens", "-l", help="A fitted lens: a folder, a .pt file, or one on the hub.")
    ] = "logit",
    any_weights: AnyWeights = False,
    decoder: Annotated[str | None, typer.Option(help="What an encoder-decoder model has already written.")] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="A picture; repeat for several.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A sound (16-bit WAV, 16,000 samples a second).")] = None,
    concept: Annotated[
        list[str] | None, typer.Option("--concept", "-c", help="A text that the picture is compared with; repeat.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the interactive page.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the table (Parquet).")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write a figure (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the grid.")] = False,
    rows: Annotated[int | None, typer.Option(min=1, help="Most sites to print; the last is always there.")] = None,
    width: Width = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: Offload = None,
    quantize: Quantize = None,
    stack: StackName = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
) -> None:
    """Print what every layer would predict: layers x tokens, shaded by probability.

    Example: logitlab read "The capital of France is" --target " Paris"

    Example: logitlab read --model resnet-50 --image cat.jpg --html cat.html
    """
    inputs = _inputs(text, file, lines, chat, image, audio)
    chosen = _positions(positions)
    wanted = statistics_of(statistics)
    for path in (html, save, figure):
        check_output(path)
    check_figure(figure)
    with status("loading the model") as say:
        placed = Placed(device, device_map, offload_folder, quantize)
        handle = load(model, dtype, placed, stack, allow_pickle, trust_remote_code, say)
        say("reading")
        from logitlab.reader import read as read_model
        from logitlab.targets import target_notes

        reading = read_model(
            handle,
            inputs,
            lens=lens_of(lens, any_weights, allow_pickle),
            sites=sites,
            positions=chosen,
            target=[target_of(t) for t in target] if target else None,
            top_k=top_k,
            statistics=wanted,
            precision=precision.value,
            decoder=decoder,
            concepts=concept,
            progress=lambda done, total: say(f"reading: {done:,} of {total:,}"),
        )
    words = handle.space.name == "vocabulary"
    notes = [f"note: {note}" for note in target_notes(handle, reading.targets)] if words else []
    _deliver(reading, notes, html=html, save=save, figure=figure, as_json=as_json, width=width, rows=rows)


@app.command()
def compare(
    text: Annotated[list[str] | None, typer.Argument(help="One prompt. Without it, standard input is read.")] = None,
    lens: LensNames = None,
    model: ModelName = "default",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a text file.")] = None,
    sites: Annotated[list[str] | None, typer.Option("--sites", "-s", help="By default those that all have.")] = None,
    position: Annotated[int, typer.Option("--position", "-p", help="Token of the printed grid; -1 is the last.")] = -1,
    figure: Annotated[
        Path | None, typer.Option(help="Write a figure: a panel for each lens (.png, .svg, .pdf).")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: Offload = None,
    quantize: Quantize = None,
    stack: StackName = None,
    any_weights: AnyWeights = False,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
) -> None:
    """Read a prompt through several lenses, side by side: sites by lenses.

    Example: logitlab compare "The capital of France is" --lens logit --lens tuned-lens
    """
    check_output(figure)
    check_figure(figure)
    prompts = prompts_of(text, file, lines=False)
    if len(prompts) != 1:
        raise InputError(f"compare takes one prompt, not {len(prompts)}: put it into quotation marks")
    names = lens or ["logit"]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"the lens {twice} is given twice")
    with status("loading the model") as say:
        placed = Placed(device, device_map, offload_folder, quantize)
        handle = load(model, dtype, placed, stack, allow_pickle, trust_remote_code, say)
        from logitlab.comparison import compare as compare_lenses

        lenses = {name: lens_of(name, any_weights, allow_pickle) for name in names}
        say("reading")
        found = compare_lenses(handle, prompts[0], titled(lenses), sites=sites)
        grid = found.grid(position=position)
        if figure is not None:
            found.figure(figure)
    from rich.console import Console

    Console().print(grid)
    if figure is not None:
        print(f"wrote {figure}", file=sys.stderr)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A file that read --save wrote.")],
    html: Annotated[Path | None, typer.Option(help="Write the interactive page.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write a figure (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the grid.")] = False,
    rows: Annotated[int | None, typer.Option(min=1, help="Most sites to print; the last is always there.")] = None,
    width: Width = None,
) -> None:
    """Print a saved reading again; no model is loaded."""
    from logitlab.reading import Reading

    for output in (html, figure):
        check_output(output)
    check_figure(figure)
    reading = Reading.load(path)
    _deliver(reading, [], html=html, save=None, figure=figure, as_json=as_json, width=width, rows=rows)


def _inputs(
    text: list[str] | None,
    file: Path | None,
    lines: bool,
    chat: bool,
    images: list[Path] | None,
    audio: Path | None,
) -> Any:
    """What is to be read: texts, a chat, pictures or a sound, or a text with pictures."""
    if images is None and audio is None:
        prompts = prompts_of(text, file, lines)
        return [[{"role": "user", "content": p}] for p in prompts] if chat else prompts
    if images and audio is not None:
        raise InputError("give pictures or a sound, not both")
    for path in (*(images or ()), *([audio] if audio else ())):
        if not path.is_file():
            raise InputError(f"there is no file at {path}: check the path")
    prompts = prompts_of(text, file, lines) if text or file else []
    if len(prompts) > 1:
        raise InputError("give one text for the pictures (or the sound), not several")
    given: dict[str, Any] = {"images": images} if images else {"audio": audio}
    if prompts:
        return given | {"text": prompts[0]}
    return audio if audio is not None else list(images or ())


def _positions(text: str | None) -> slice | list[int] | None:
    if text is None:
        return None
    try:
        if ":" in text:
            return slice(*(int(part) if part.strip() else None for part in text.split(":")))
        return [int(part) for part in text.split(",")]
    except (ValueError, TypeError):
        raise InputError(f"positions {text!r} are not understood: write 3, -1, 0,5,-1 or a slice such as 2:8") from None


def _deliver(
    reading: Reading,
    notes: list[str],
    *,
    html: Path | None,
    save: Path | None,
    figure: Path | None,
    as_json: bool,
    width: int | None,
    rows: int | None,
) -> None:
    """Write the files first, so that a full disk leaves standard output empty; then print."""
    outputs = ((html, reading.html), (save, reading.save), (figure, reading.figure))
    notes = notes + [f"wrote {write(path)}" for path, write in outputs if path is not None]
    if as_json:
        _print_json(reading)
    else:
        _print_grid(reading, width, rows)
    for note in notes:
        print(note, file=sys.stderr)


def _print_grid(reading: Reading, width: int | None, rows: int | None) -> None:
    from rich.console import Console

    from logitlab.views.terminal import grid

    console = Console(width=width, highlight=False)
    console.print(grid(reading, width=console.width, rows=rows))


def _print_json(reading: Reading) -> None:
    from logitlab.reading import to_json

    prompts = [{"text": p.text, "ids": p.ids, "tokens": p.tokens, "positions": p.positions} for p in reading.prompts]
    out = sys.stdout
    out.write(to_json({"provenance": reading.provenance, "prompts": prompts})[:-1] + ', "cells": [\n')
    for i, row in enumerate(reading.rows()):
        out.write(("" if i == 0 else ",\n") + to_json(row))
    out.write("\n]}\n")
