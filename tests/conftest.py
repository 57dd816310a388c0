"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # nor is one asked of whoever runs the tests
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import logitlab as ll
from logitlab.models.cache import default_gguf
from tests import zoo


@pytest.fixture(scope="session")
def llama() -> ll.Model:
    """A tiny verified Llama with a tokenizer; do not change it."""
    return ll.wrap(zoo.shared("llama"), zoo.tokenizer(), name="tiny-llama")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint folder; do not change it."""
    return zoo.save(tmp_path_factory.mktemp("checkpoint") / "tiny-llama")


@pytest.fixture(scope="session")
def default_model() -> ll.Model:
    """The default model (its package is part of the development environment)."""
    assert default_gguf() is not None, "the default model's package is not installed: run `make setup`"
    return ll.load("default")
