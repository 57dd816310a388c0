"""logitlab with screened products."""

from __future__ import annotations

from contestants import logitlab_exact


class Contestant(logitlab_exact.Contestant):
    """`logitlab.read` with ``precision="screened"``."""

    precision = "screened"
