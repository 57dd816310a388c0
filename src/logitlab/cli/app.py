"""The application: what runs a command and says how it ended."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from typing import Annotated, Any

import typer

from logitlab import __version__
from logitlab.cli.options import InterruptedWorkError
from logitlab.errors import LogitlabError, VerificationError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


# Typer brings its own copy of click from some version on; either way this is the base of its errors.
_ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="logitlab",
    help="Read language models through their logits.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0 (done), 1 (a check did not hold), 2 (bad input) or 130 (Ctrl-C)."""
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # what libraries say to programmers
            result = app(args=arguments, standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except _ClickException as error:
        return _fail(f"{_usage(error)} (see logitlab --help)", 2)
    except VerificationError as error:
        return _fail(str(error), 1)
    except InterruptedWorkError as error:
        return _fail(str(error), INTERRUPTED)
    except LogitlabError as error:
        return _fail(str(error), 2)
    except (BrokenPipeError, SystemExit) as error:
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # The reader of our output has gone, as in `logitlab ... | head`.
        with suppress(OSError, ValueError):  # what is still in the buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if result == INTERRUPTED:
        return _fail("interrupted; no output file was touched", INTERRUPTED)
    return result if isinstance(result, int) else 0


def run() -> None:
    """Entry point of the ``logitlab`` command."""
    sys.exit(main())


def _usage(error: Any) -> str:
    """What was wrong with the command line; nothing named at all is answered by the help on standard output."""
    return "no command was given" if type(error).__name__ == "NoArgsIsHelpError" else error.format_message()


def _fail(message: str, code: int) -> int:
    print(f"logitlab: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_version(value: bool) -> None:
    if value:
        print(f"logitlab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
