"""What a server was started with: which models, lenses and vectors it may use, for whom, and how much at once."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitlab.models.handle import Model

Say = Callable[[str], None]

LOGIT = "logit"
"""What the logit lens is called; no other lens is called that."""

FAILED = "the server failed; its terminal says why"
"""What is told of errors that are the server's own."""

SITES = 81
"""Sites of the residual stream of the deepest common models: 80 layers, and what goes into the first one."""

CHARACTERS = 25
"""Most characters a token has on average: indented code has more of them than prose."""


def _load(place: str, say: Say) -> Model:
    from logitlab.models.load import load

    return load(place)


@dataclass(frozen=True)
class Source:
    """A model, a lens or a file of vectors that may be used.

    Attributes:
        name: what it is called in the browser: never a path.
        place: what it is loaded from: a name, a folder or a file.
        local: whether ``place`` is a path, so that ``name`` alone does not find it.
    """

    name: str
    place: str
    local: bool


def named(places: Iterable[str], *, reserved: Iterable[str] = ()) -> tuple[Source, ...]:
    """Names for what was given at the start: the last part of a path, anything else as it is; no name twice.

    Args:
        places: names, folders and files.
        reserved: names that mean something else already.

    Example:
        >>> [source.name for source in named(["default", "default"])]
        ['default', 'default-2']
    """
    found: list[Source] = []
    taken = set(reserved)
    for place in places:
        path = Path(place).expanduser()
        local = place != "default" and (path.exists() or place.startswith((".", "/", "~")))
        base = _last_part(path) if local else place
        name = next(n for n in (base, *(f"{base}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        taken.add(name)
        found.append(Source(name, place, local))
    return tuple(found)


def _last_part(path: Path) -> str:
    """The last part of a path as it was given: what a link leads to may have a name that says nothing."""
    name = path.absolute().name
    return name if name not in ("", "..") else path.resolve().name or "root"


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for, and how many may wait.

    Attributes:
        prompt_tokens: tokens of a prompt.
        prompt_characters: characters of a prompt, before it is made into tokens.
        new_tokens: tokens that are written to a prompt.
        waiting: requests that wait while another one is worked on.
        upload_bytes: bytes of a request.
        cells: sites times positions of a reading, new tokens among them.
        places: sites times positions that one request patches, each by a pass of its own.
        images: pictures in a prompt.
        pixels: pixels of all pictures of a prompt together.
    """

    prompt_tokens: int = 4096
    prompt_characters: int = 102_400
    new_tokens: int = 512
    waiting: int = 8
    upload_bytes: int = 16 * 1024 * 1024
    cells: int = 373_248
    places: int = 16_384
    images: int = 4
    pixels: int = 16_000_000

    @classmethod
    def of(cls, prompt_tokens: int, **given: Any) -> Limits:
        """Limits that let prompts of so many tokens in, at every site of the residual stream.

        Args:
            prompt_tokens: tokens of a prompt.
            given: other limits.
        """
        least = cls(prompt_tokens=prompt_tokens, **given)
        characters = max(least.prompt_characters, CHARACTERS * prompt_tokens)
        cells = max(least.cells, SITES * (prompt_tokens + least.new_tokens))
        upload = max(least.upload_bytes, 4 * characters)
        return replace(least, prompt_characters=characters, cells=cells, upload_bytes=upload)

    @property
    def text_bytes(self) -> int:
        """Bytes of a request without its pictures: four texts, six bytes for each character."""
        return min(self.upload_bytes, 4 * 6 * self.prompt_characters + 65_536)


@dataclass(frozen=True)
class Settings:
    """All that a server knows from its start.

    Attributes:
        models: the models that may be used; the first one is loaded at once.
        lenses: fitted lenses that may be used.
        vectors: files of vectors that may be used.
        host: the address that it listens at.
        port: its port.
        token: what requests have to know.
        hosts: other names under which browsers may address it: ``name`` or ``name:port``.
        limits: how much may be asked for.
        history: the folder of past requests; None for no history.
        load: gives a verified model from `Source.place`; it is told a function that says what is going on.
        options: arguments of `logitlab.load` beside the name, for the scripts that users are shown.
        any_weights: whether lenses and vectors may be used on other weights than their own.
        allow_pickle: whether pickled lenses may be read.
        kept: models that stay loaded.
    """

    models: tuple[Source, ...]
    lenses: tuple[Source, ...] = ()
    vectors: tuple[Source, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8765
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    hosts: tuple[str, ...] = ()
    limits: Limits = Limits()
    history: Path | None = None
    load: Callable[[str, Say], Model] = _load
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    any_weights: bool = False
    allow_pickle: bool = False
    kept: int = 2

    @property
    def addresses(self) -> tuple[str, ...]:
        """What the header Host of a request may say, in small letters."""
        names = ["127.0.0.1", "localhost", "[::1]"]
        if self.host not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
            names.append(f"[{self.host}]" if ":" in self.host else self.host)
        found = [f"{name}:{self.port}" for name in names]
        found += names if self.port == 80 else []
        for name in self.hosts:
            found.append(name)
            if ":" not in name.rpartition("]")[2]:
                found.append(f"{name}:{self.port}")
        return tuple(dict.fromkeys(one.lower() for one in found))

    @property
    def address(self) -> str:
        """The address to open in a browser."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    @property
    def entrance(self) -> str:
        """The address with the token, for whoever started the server. No browser sends what is behind the ``#``."""
        return f"{self.address}#token={self.token}"
