"""Commands about corpora and lenses: ``fit``, ``sweep`` and ``generate``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from enum import StrEnum
from math import exp, log10
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logitlab.cli.app import app
from logitlab.cli.options import (
    AnyWeights,
    Device,
    DeviceMap,
    Dtype,
    InterruptedWorkError,
    LensNames,
    ModelName,
    Offload,
    Pickle,
    Placed,
    Precision,
    Quantize,
    Remote,
    StackName,
    check_figure,
    check_output,
    lens_of,
    load,
    prompts_of,
    status,
    target_of,
    titled,
)
from logitlab.errors import InputError

if TYPE_CHECKING:
    from logitlab.lenses import FittedLens


class Kind(StrEnum):
    """The kinds of `logitlab.lenses.FAMILIES`, where no torch is imported."""

    BIAS = "bias"
    DIAGONAL = "diagonal"
    LOW_RANK = "low-rank"
    AFFINE = "affine"
    JACOBIAN = "jacobian"


CorpusName = Annotated[
    str, typer.Argument(help="A text, JSONL or Parquet file, a folder of such, - for standard input, or 'books'.")
]
Column = Annotated[str, typer.Option(help="Which column of a table is the text.")]
Sites = Annotated[list[str] | None, typer.Option("--sites", "-s", help="For instance resid, mlp_out, ::4.resid_post.")]


@app.command()
def fit(
    corpus: CorpusName,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the lens, and for checkpoints until it is done.")
    ],
    kind: Annotated[Kind, typer.Option(help="Family of maps.")] = Kind.AFFINE,
    model: ModelName = "default",
    sites: Sites = None,
    column: Column = "text",
    decoder_column: Annotated[
        str | None, typer.Option(help="Encoder-decoder models: which column the decoder has written.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of a low-rank lens (32).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps (250).")] = None,
    windows_per_step: Annotated[int | None, typer.Option(min=1, help="Windows of a step (4).")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a window (256; Jacobian lens: 128).")] = None,
    share: Annotated[float | None, typer.Option(help="Part of a window's positions that a step uses (0.25).")] = None,
    optimiser: Annotated[str | None, typer.Option(help="adam, or sgd with Nesterov momentum (adam).")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate; it falls linearly to 0 (0.001).")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Looks without any gain after which to stop (4).")] = None,
    products: Annotated[
        str | None, typer.Option(help="Products with the head for the gradient: bfloat16 or float32 (bfloat16).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of windows and the choice of positions (0).")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Jacobian lens: windows to measure on (100).")] = None,
    skip_first: Annotated[int | None, typer.Option(min=0, help="Jacobian lens: positions to leave out (16).")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: Offload = None,
    quantize: Quantize = None,
    stack: StackName = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
) -> None:
    """Fit a lens on a corpus. Broken off, the same command goes on where it was.

    Example: logitlab fit books --kind diagonal --out diagonal-lens

    On several GPUs or machines: torchrun --nproc-per-node 4 --no-python logitlab fit ... (or accelerate launch).
    """
    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    with status("loading the model") as say:
        placed = Placed(device or own_device(device_map), device_map, offload_folder, quantize)
        handle = load(model, dtype, placed, stack, allow_pickle, trust_remote_code, say)
        say("fitting")
    from logitlab.lenses.fit import fit as fit_lens

    given: dict[str, Any] = {
        "rank": rank,
        "steps": steps,
        "windows_per_step": windows_per_step,
        "length": length,
        "share": share,
        "optimiser": optimiser,
        "rate": rate,
        "patience": patience,
        "products": products,
        "seed": seed,
        "decoder_column": decoder_column,
        "prompts": prompts,
        "skip_first": skip_first,
    }
    options = {name: value for name, value in given.items() if value is not None}
    with _going_on(out, "steps") as tell:

        def progress(p: Any) -> None:
            if first:
                tell(p.step, p.steps, p.left, p.words)

        lens = fit_lens(
            handle, corpus, kind=kind.value, sites=sites, column=column, folder=out, progress=progress, **options
        )
    if first:
        _print_fit(lens)
        print(f"wrote {out}", file=sys.stderr)


def own_device(device_map: str | None) -> str | None:
    """The GPU of this process, where several have been started together and nothing else is said."""
    import torch

    rank = os.environ.get("LOCAL_RANK", "")
    if device_map is not None or not rank.isdigit() or not torch.cuda.is_available():
        return None
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


def _print_fit(lens: FittedLens) -> None:
    """What a fit has gained at every site."""
    table = lens.metrics.get("validation KL, nats")
    if not table:
        print(f"{lens.name} of {lens.model['name']}: {len(lens.sites)} sites, {lens.recipe.get('prompts')} prompts")
        return
    print(f"{'site':<16}{'logit lens':>12}{lens.name:>16}   KL from the model's distribution, nats, validation windows")
    for site, row in table.items():
        print(f"{site:<16}{row['logit lens']:>12.4f}{row['fitted']:>16.4f}")


@app.command()
def sweep(
    corpus: CorpusName,
    model: ModelName = "default",
    lens: LensNames = None,
    sites: Sites = None,
    column: Column = "text",
    group: Annotated[str | None, typer.Option(help="Column by whose values tokens are grouped as well.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for shards and the report.")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Also write every token as Parquet, shard by shard.")] = False,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    apart: Annotated[bool, typer.Option("--apart", help="Do not pack texts: each has windows of its own.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after about so many tokens.")] = None,
    skip_first: Annotated[int, typer.Option(min=0, help="Tokens at the beginning of a window to leave out.")] = 0,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Top tokens that are compared.")] = 5,
    precision: Annotated[Precision, typer.Option(help="exact, screened or auto.")] = Precision.EXACT,
    figure: Annotated[Path | None, typer.Option(help="Write curves over the layers (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one row for each lens, group and site.")] = False,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster: auto, local, HOST:PORT.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --ray: how many workers.")] = None,
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
    """Measure lenses over a corpus: KL, cross-entropy, agreement, prediction depth, calibration, by layer.

    Example: logitlab sweep books --max-tokens 50000 --out sweep
    """
    check_output(figure)
    check_figure(figure)
    with status("loading the model") as say:
        placed = Placed(device, device_map, offload_folder, quantize)
        handle = load(model, dtype, placed, stack, allow_pickle, trust_remote_code, say)
    from logitlab.sweeps import sweep as sweep_corpus

    lenses = {name: lens_of(name, any_weights, allow_pickle) for name in lens or ["logit"]}
    with _going_on(out, "tokens") as tell:

        def progress(p: Any) -> None:
            tell(p.tokens, max_tokens, p.left, f"{p.rate:,.0f} tokens/s")

        report = sweep_corpus(
            handle,
            corpus,
            lens=titled(lenses),
            sites=sites,
            top_k=top_k,
            length=length,
            packed=False if apart else None,
            column=column,
            group=group,
            skip_first=skip_first,
            max_tokens=max_tokens,
            precision=precision.value,
            folder=out,
            rows=rows,
            ray=ray,
            workers=workers,
            progress=progress,
        )
    if figure is not None:
        from logitlab.views.curves import curves

        curves(report, figure)
    if as_json:
        from logitlab.reading import to_json

        print("[" + ",\n".join(to_json(row) for row in report.rows()) + "]")
    else:
        from rich.console import Console

        from logitlab.views.curves import table

        console = Console(highlight=False)
        for one in table(report, console.width):
            console.print(one)
    for path in (figure, out):
        if path is not None:
            print(f"wrote {path}", file=sys.stderr)


@app.command()
def generate(
    text: Annotated[list[str] | None, typer.Argument(help="The prompt. Without one, standard input is read.")] = None,
    model: ModelName = "default",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens to write.")] = 32,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens instead of taking the most likely one.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    top_p: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    seed: Annotated[int, typer.Option(help="With --sample.")] = 0,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="Token to follow beside; repeat.")] = None,
    sites: Sites = None,
    lens: Annotated[str, typer.Option("--lens", "-l", help="A fitted lens, or 'logit'.")] = "logit",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a token, as it is written.")] = False,
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
    """Let a model write, and print for every new token where it came up in the layers.

    Example: logitlab generate "The capital of France is" -n 8
    """
    prompts = prompts_of(text, None, False)
    if len(prompts) > 1:
        raise InputError(f"give one prompt, not {len(prompts)}: a model writes one text at a time here")
    if not sample and (temperature is not None or top_p is not None):
        raise InputError("--temperature and --top-p are about drawing tokens: add --sample")
    with status("loading the model") as say:
        placed = Placed(device, device_map, offload_folder, quantize)
        handle = load(model, dtype, placed, stack, allow_pickle, trust_remote_code, say)
    from logitlab.generation import generate as generate_steps

    options: dict[str, Any] = {"do_sample": sample}
    options |= {k: v for k, v in (("temperature", temperature), ("top_p", top_p)) if v is not None}
    steps = generate_steps(
        handle,
        [{"role": "user", "content": prompts[0]}] if chat else prompts[0],
        max_new_tokens=max_new_tokens,
        seed=seed if sample else None,
        lens=lens_of(lens, any_weights, allow_pickle),
        sites=sites,
        target=[target_of(t) for t in target] if target else None,
        **options,
    )
    _print_steps(steps, as_json)


def _print_steps(steps: Any, as_json: bool) -> None:
    """One line for each token, as soon as it is there."""
    from logitlab.reading import to_json
    from logitlab.views.tokens import visible

    for n, step in enumerate(steps):
        if n == 0 and not as_json:
            print(f"{'token':<20}{'p':>8}  {'first from':<16}{'ranks by layer'}")
        reading = step.reading
        ranks = [int(r) for r in reading.arrays["target_rank"][0, :, 0, 0]]
        settled = next((i for i in range(len(ranks)) if all(r == 1 for r in ranks[i:])), None)
        site = None if settled is None else reading.sites[settled]
        if as_json:
            cells = list(reading.rows())
            found = {"token_id": step.token_id, "token": step.token, "text": step.text, "logprob": step.logprob}
            print(to_json(found | {"first_from": site, "cells": cells}), flush=True)
            continue
        line = f"{visible(step.token):<20}{exp(step.logprob):>8.1%}  {site or '(drawn)':<16}{_spark(ranks)}"
        print(line, flush=True)


def _spark(ranks: list[int]) -> str:
    """Ranks as blocks: the higher, the nearer to 1."""
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[max(0, 7 - round(1.75 * log10(r)))] for r in ranks)


@contextmanager
def _going_on(folder: Path | None, unit: str) -> Generator[Callable[[int, int | None, float | None, str], None]]:
    """Show on standard error how far long work is; after Ctrl-C say how to go on."""
    terminal = sys.stderr.isatty()
    with status("starting") as say:

        def tell(done: int, total: int | None, left: float | None, words: str) -> None:
            amount = f"{done:,}" + (f" of {total:,}" if total is not None else "") + f" {unit}"
            time = "" if left is None else f", {_time(left)} left"
            if terminal:
                say(f"{amount}{time}, {words}")
            else:
                print(f"{amount}{time}, {words}", file=sys.stderr, flush=True)

        try:
            yield tell
        except KeyboardInterrupt:
            where = "nothing was kept" if folder is None else f"the same command goes on from what is in {folder}"
            raise InterruptedWorkError(f"interrupted; {where}") from None


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
