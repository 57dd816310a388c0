"""The errors that logitlab raises on purpose, each one sentence: what, where, what to do instead."""

from __future__ import annotations


class LogitlabError(Exception):
    """Base of every error that logitlab raises on purpose; the CLI prints it as one line."""


class InputError(LogitlabError, ValueError):
    """Something the caller gave cannot be used: a prompt, a target, a site, a file, an option."""


class ModelError(LogitlabError, ValueError):
    """A model cannot be loaded, or has no part that logitlab can read."""


class KernelError(LogitlabError):
    """A kernel cannot be compiled or started on this GPU."""


class OutOfMemoryError(LogitlabError):
    """There is not enough memory for a forward pass, or to decode what it left."""


class VerificationError(ModelError):
    """A model was loaded, but its tail did not reproduce the model's own logits."""
