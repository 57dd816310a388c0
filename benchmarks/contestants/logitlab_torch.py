"""logitlab where there is no C compiler."""

from __future__ import annotations

import os

os.environ["LOGITLAB_NATIVE"] = "0"

from contestants import logitlab_exact


class Contestant(logitlab_exact.Contestant):
    """`logitlab.read` on PyTorch alone."""
