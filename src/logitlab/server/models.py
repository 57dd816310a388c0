"""The models, lenses and vectors that a server may use, by name; models are loaded when they are first asked for."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import OrderedDict
from typing import Any

from logitlab.errors import InputError, LogitlabError
from logitlab.interventions import Vectors
from logitlab.lenses import Lens, LogitLens, load_lens
from logitlab.models.handle import Model
from logitlab.models.sites import KINDS
from logitlab.server.settings import LOGIT, Say, Settings, Source

_LOG = logging.getLogger("logitlab.server")


class Library:
    """What may be used.

    Args:
        settings: the names, and how a model is loaded.

    Raises:
        InputError: a lens or a file of vectors cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lenses: dict[str, Lens] = {
            source.name: load_lens(source.place, any_weights=settings.any_weights, allow_pickle=settings.allow_pickle)
            for source in settings.lenses
        }
        self.vectors: dict[str, Vectors] = {}
        for source in settings.vectors:
            found = Vectors.load(source.place)
            self.vectors[source.name] = found.for_any_weights() if settings.any_weights else found
        self._sources = {source.name: source for source in settings.models}
        self._loaded: OrderedDict[str, Model] = OrderedDict()
        self._lock = threading.Lock()

    def about(self) -> list[dict[str, Any]]:
        """The models by name, and whether they are loaded."""
        with self._lock:
            return [{"name": name, "loaded": name in self._loaded} for name in self._sources]

    def model(self, name: str, say: Say) -> Model:
        """A model, loaded if it is not; the one that was used longest ago makes room for it.

        One thread at a time may call this.

        Args:
            name: what it is called here.
            say: is told what goes on.

        Raises:
            InputError: there is none of this name, or it cannot be loaded.
        """
        source = self._sources.get(name)
        if source is None:
            raise InputError(f"there is no model {name!r} here; there are {', '.join(self._sources)}")
        with self._lock:
            if name in self._loaded:
                self._loaded.move_to_end(name)
                return self._loaded[name]
            crowded = len(self._loaded) >= self.settings.kept
            if crowded:
                self._loaded.popitem(last=False)
        if crowded:
            _free()
        say(f"loading {name}")
        begun = time.perf_counter()
        found = self._load(source, say)
        _LOG.info("loaded %s in %.1f s", name, time.perf_counter() - begun)
        with self._lock:
            self._loaded[name] = found
        return found

    def _load(self, source: Source, say: Say) -> Model:
        last = f"loading {source.name}"

        def told(what: str) -> None:
            """What the loader says names folders of this machine: of that only what is done goes on, with our name."""
            nonlocal last
            now = f"{'converting' if what.startswith('converting ') else 'loading'} {source.name}"
            if now != last:
                last = now
                _LOG.info(now)
                say(now)

        try:
            return self.settings.load(source.place, told)
        except LogitlabError as error:
            # Its message may name folders of this machine.
            _LOG.error("%s cannot be loaded: %s", source.name, " ".join(str(error).split()))
            raise InputError(f"{source.name} cannot be loaded; the server's terminal says why") from None

    def lens(self, name: str) -> Lens:
        """A lens by its name.

        Raises:
            InputError: there is none.
        """
        if name == LOGIT:
            return LogitLens()
        if name not in self.lenses:
            raise InputError(f"there is no lens {name!r} here; there are {', '.join([LOGIT, *self.lenses])}")
        return self.lenses[name]

    def vectors_of(self, name: str) -> Vectors:
        """A file of vectors by its name.

        Raises:
            InputError: there is none.
        """
        if name not in self.vectors:
            raise InputError(
                f"there are no vectors {name!r} here; there are {', '.join(self.vectors)}"
                if self.vectors
                else "there are no vectors here: start the server with --vectors FILE"
            )
        return self.vectors[name]


def facts(model: Model, name: str) -> dict[str, Any]:
    """What a browser has to know of a model: plain values."""
    tokenizer: Any = model.tokenizer
    words = model.space.name == "vocabulary"
    return {
        "model": name,
        "layers": model.n_layers,
        "width": model.width,
        "kinds": [kind for kind in KINDS if any(model.offers(layer, kind) for layer in range(model.n_layers))],
        "lastSite": str(model.last_site),
        "sites": [str(site) for site in model.select_sites(None)],
        "verified": model.verification.text,
        "chat": bool(getattr(tokenizer, "chat_template", None)),
        "text": takes_text(model),
        "images": takes_pictures(model),
        "words": words,
        "generates": words and can_write(model),
    }


def takes_text(model: Model) -> bool:
    """Whether a text is read as a text; some models would take it for the name of a file."""
    if model.space.name == "concepts" or model.template.tokens is None:
        return False
    return not (model.encoder_decoder and "input_ids" not in model.template.inputs)


def takes_pictures(model: Model) -> bool:
    """Whether pictures can be read, and there is a processor that prepares them."""
    return model.processor is not None and model.takes("pixel_values") and model.space.name != "concepts"


def can_write(model: Model) -> bool:
    """Whether the model can generate token by token."""
    module: Any = model.module
    able = getattr(module, "can_generate", None)
    return hasattr(module, "generate") and (able is None or bool(able())) and model.tail.by == "tokens"


def _free() -> None:
    """Give memory back that a model has left."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
