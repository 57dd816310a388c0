"""The commands. Nothing heavy is imported before a command needs it."""

from logitlab.cli import corpora as corpora
from logitlab.cli import models as models
from logitlab.cli import reading as reading
from logitlab.cli import serve as serve
from logitlab.cli import studies as studies
from logitlab.cli.app import INTERRUPTED, app, main, run

__all__ = ["INTERRUPTED", "app", "main", "run"]
