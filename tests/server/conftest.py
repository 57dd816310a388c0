"""Tiny models, a lens and a file of vectors in a folder; a server that may use them."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTImageProcessor

import logitlab as ll
from logitlab import zoo as library
from logitlab.lenses.fitted import identity
from logitlab.server.settings import Limits, Settings, Source, named
from logitlab.vectors import mean_difference
from tests import zoo
from tests.models.test_encoder import llava
from tests.server.running import Running, running

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@dataclass(frozen=True)
class Shelf:
    """What the server of most tests may use.

    Attributes:
        folder: holds the model ``tiny``, the lens ``tuned`` (for ``tiny``) and ``mood.safetensors``.
        models: by name.
        lens: as it is on disk.
        vectors: as they are on disk.
    """

    folder: Path
    models: dict[str, ll.Model]
    lens: Any
    vectors: Any

    def load(self, place: str, say: Any) -> ll.Model:
        say("reading the files")
        return self.models[Path(place).name]


@cache
def vit() -> ll.Model:
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    return ll.wrap(library.build("image-classification", "vit"), processor, name="vit")


def slow(seconds: float) -> ll.Model:
    """A model that takes its time for each pass, and writes as much as it may."""
    module = zoo.build("llama", seed=3)
    module.generation_config.eos_token_id = module.config.eos_token_id = None  # it does not stop by itself
    model = ll.wrap(module, zoo.tokenizer(), name="slow")
    module.get_input_embeddings().register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return model


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("shelf")
    zoo.save(folder / "tiny")
    (folder / "tiny" / "chat_template.jinja").write_text(CHAT)
    zoo.save(folder / "other", "qwen3", seed=1)
    models = {"tiny": ll.load(folder / "tiny"), "other": ll.load(folder / "other")}
    models |= {"vit": vit(), "llava": llava(), "slow": slow(0.02)}
    lens = identity(models["tiny"], "affine", ["0.resid_post", "1.resid_post"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lens.maps.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    lens.save(folder / "tuned")
    vectors = mean_difference(models["tiny"], ["The capital"], ["the sea"], ["1.resid_post", "2.resid_post"])
    vectors.save(folder / "mood.safetensors")
    return Shelf(folder, models, lens, vectors)


def settings(shelf: Shelf, **changes: Any) -> Settings:
    """Settings of a server that may use all of the shelf."""
    held = [Source(name, name, False) for name in ("vit", "llava", "slow")]
    given: dict[str, Any] = {
        "models": (*named([str(shelf.folder / "tiny"), str(shelf.folder / "other")]), *held),
        "lenses": named([str(shelf.folder / "tuned")]),
        "vectors": named([str(shelf.folder / "mood.safetensors")]),
        "load": shelf.load,
        "kept": 8,
        "limits": Limits(
            prompt_tokens=48,
            prompt_characters=600,
            new_tokens=40,
            waiting=4,
            upload_bytes=200_000,
            cells=1000,
            places=300,
            images=2,
            pixels=20_000,
        ),
    }
    return Settings(**(given | changes))


@pytest.fixture(scope="session")
def app(shelf: Shelf) -> Iterator[Running]:
    """A server without a history."""
    with running(settings(shelf)) as it:
        yield it


@pytest.fixture
def recorded(shelf: Shelf, tmp_path: Path) -> Generator[Running]:
    """A server with a history, in ``tmp_path / "history"``."""
    with running(settings(shelf, history=tmp_path / "history")) as it:
        yield it
