"""What the commands share: options, how a model is loaded for them, how they tell what is going on."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from logitlab.errors import InputError, LogitlabError

if TYPE_CHECKING:
    from logitlab.lenses import Lens
    from logitlab.models.handle import Model

FIGURES = (".png", ".svg", ".pdf")
"""Formats of figures, by the ending of the file's name."""


class InterruptedWorkError(LogitlabError):
    """Ctrl-C during work that leaves something behind; the message says what and how to go on."""


STATISTICS = ("entropy", "kl")
"""The names in `logitlab.plan.STATISTICS`, where no torch is imported."""


class Precision(StrEnum):
    """The names in `logitlab.logits.PRECISIONS`, where no torch is imported."""

    EXACT = "exact"
    SCREENED = "screened"
    AUTO = "auto"


ModelName = Annotated[
    str, typer.Option("--model", "-m", help="'default', a fetched name, a hub id, a folder, or a .gguf file.")
]

Width = Annotated[
    int | None, typer.Option(min=20, help="Columns of the printed grid; by default the terminal's, and at most those.")
]

Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]

Device = Annotated[str | None, typer.Option(help="Where to put the model, for instance cuda.")]

DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="auto, or JSON: module paths and devices, cpu and disk among them.")
]

Offload = Annotated[Path | None, typer.Option("--offload-folder", help="Folder for weights that go to disk.")]

Quantize = Annotated[str | None, typer.Option("--quantize", help="int8 or int4: round weights while they are read.")]

StackName = Annotated[str | None, typer.Option("--stack", help="Which layer stack to read, by part of its path.")]

LensNames = Annotated[
    list[str] | None,
    typer.Option(
        "--lens", "-l", help="A fitted lens: a folder, a .pt file, or one on the hub; 'logit' for the logit lens."
    ),
]
AnyWeights = Annotated[bool, typer.Option("--any-weights", help="Use a lens that was fitted on other weights.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read pickled weights (weights-only).")]

Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]


def prompts_of(text: list[str] | None, file: Path | None, lines: bool) -> list[str]:
    """The prompts that were named: arguments, a file, or standard input."""
    if text and text != ["-"]:
        if file is not None:
            raise InputError("give prompts as arguments or with --file, not both")
        return text
    if file is not None:
        try:
            content = file.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}; give a text file") from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"cannot read {file}: it is not UTF-8 text (byte {error.start}); save it as UTF-8"
            ) from error
    else:
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError('there is no prompt: logitlab read "some text", or --file, or standard input')
        try:
            content = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InputError(
                f"cannot read standard input: it is not UTF-8 text (byte {error.start}); convert it to UTF-8"
            ) from error
    if lines:
        return [line for line in content.splitlines() if line.strip()]
    return [content.removesuffix("\n")]


def statistics_of(text: str) -> list[str]:
    """What ``--statistics`` names."""
    names = [] if text.strip() == "none" else [name.strip() for name in text.split(",")]
    bad = next((name for name in names if name not in STATISTICS), None)
    if bad is not None:
        raise InputError(
            f"--statistics {text!r}: {bad!r} is none of entropy and kl; give one, both as entropy,kl, or none"
        )
    return names


def target_of(text: str) -> str | int:
    """What ``--target`` names: a token, or ``id:`` and a number."""
    if text.startswith("id:"):
        try:
            return int(text[3:])
        except ValueError:
            raise InputError(f"target {text!r}: after id: comes a whole number, for instance id:42") from None
    return text


def check_output(path: Path | None) -> None:
    """Say at once that a result could not be written, not after the model has run."""
    if path is None:
        return
    from logitlab.files import check_writable

    check_writable(path)


def check_figure(path: Path | None) -> None:
    """Say at once that a figure could not be drawn."""
    if path is None:
        return
    if path.suffix.lower() not in FIGURES:
        raise InputError(f"cannot write {path}: a figure's name ends in {', '.join(FIGURES)}")
    if find_spec("matplotlib") is None:
        raise InputError("a figure needs matplotlib: pip install 'logitlab[figures]'")


class Placed(NamedTuple):
    """Options about where and how weights are kept."""

    device: str | None
    device_map: str | None
    offload_folder: Path | None
    quantize: str | None

    def options(self) -> dict[str, Any]:
        """The same as arguments of `logitlab.load`."""
        given = self.device_map
        parsed: Any = given
        if given is not None and given.lstrip().startswith("{"):
            try:
                parsed = json.loads(given)
            except json.JSONDecodeError as error:
                raise InputError(f"--device-map is not valid JSON: {error}") from error
        return self._asdict() | {"device_map": parsed}


def load(
    name: str,
    dtype: str,
    placed: Placed,
    stack: str | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    say: Any,
) -> Model:
    """Load a model for a command; ``say`` is told what goes on."""
    handler = _Telling(say)
    logging.getLogger("logitlab").addHandler(handler)
    logging.getLogger("logitlab").setLevel(logging.INFO)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the status line says what is going on
    for name_of_logger in ("torchao", "torch.utils._pytree"):  # where torchao is installed, transformers imports it
        logging.getLogger(name_of_logger).setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries end in our one line
        from logitlab.models.load import load

        return load(
            name,
            dtype=dtype,
            stack=stack,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            **placed.options(),
        )
    finally:
        logging.getLogger("logitlab").removeHandler(handler)


class _Telling(logging.Handler):
    """Show what the library reports in the status line."""

    def __init__(self, say: Any) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


@contextmanager
def status(text: str) -> Generator[Callable[[str], None]]:
    """A status line on standard error while something takes time; silent when that is no terminal."""
    if not sys.stderr.isatty():
        yield _say_nothing
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(text)) as status:

        def say(message: str) -> None:
            status.update(Text(message))

        yield say


def _say_nothing(message: str) -> None:
    pass


def lens_of(name: str, any_weights: bool, allow_pickle: bool) -> Lens:
    """The lens that ``--lens`` names."""
    from logitlab.lenses import LogitLens, load_lens

    if name == "logit":
        return LogitLens()
    return load_lens(name, any_weights=any_weights, allow_pickle=allow_pickle)


def titled(lenses: dict[str, Lens]) -> dict[str, Lens]:
    """Lenses by short names, where these tell them apart."""
    short = [one.name if name == "logit" else name.rstrip("/").rpartition("/")[2] for name, one in lenses.items()]
    return dict(zip(short if len(set(short)) == len(short) else lenses, lenses.values(), strict=True))
