"""What may be asked for: the bodies of requests, every field bounded, and nothing beside them.

The bounds here are what no request may go beyond; a server's own limits (`logitlab.server.settings.Limits`) are checked
when the work begins.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from logitlab.errors import InputError

VALUES = 4096
"""Values in a body; no request has nearly as many."""

ERRORS = 64
"""Errors in a body that are looked at one by one, so that the first can be told."""

TEXT_BYTES = 2 * 1024 * 1024
"""Bytes of a body without its pictures, where nothing else is said."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Text = Annotated[str, StringConstraints(max_length=16 * 1024 * 1024)]
Token = Annotated[str, StringConstraints(min_length=1, max_length=200)]
SiteText = Annotated[str, StringConstraints(min_length=1, max_length=40)]
Tokens = Annotated[int, Field(ge=1, le=4096)]
Sites = Annotated[
    list[SiteText],
    Field(min_length=1, max_length=64),
    AfterValidator(lambda sites: list(dict.fromkeys(sites))),  # each once
]
Place = Annotated[int, Field(ge=-1_000_000, le=1_000_000)]
Strength = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
PICTURE = r"^data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}$"
_PICTURES = re.compile(rb'"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=]*+"')
# A string that does not end goes to the end, so that no part of the body is looked at twice.
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


class Body(BaseModel):
    """What all bodies share: nothing unknown is taken, and no type is taken for another."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Prompt(Body):
    """A text, a chat, or pictures with or without a text. Pictures are data addresses: never paths, never links."""

    text: Text | None = None
    chat: Annotated[list[Message], Field(min_length=1, max_length=100)] | None = None
    images: (
        Annotated[
            list[Annotated[str, StringConstraints(max_length=64 * 1024 * 1024, pattern=PICTURE)]],
            Field(min_length=1, max_length=16),
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _one_kind(self) -> Prompt:
        if self.chat is not None and (self.text is not None or self.images is not None):
            raise ValueError("give a text or a chat, not both; pictures go with a text")
        if self.chat is None and self.text is None and self.images is None:
            raise ValueError("give a text, a chat or images")
        return self

    @property
    def title(self) -> str:
        """What the prompt is called in titles."""
        text = self.chat[-1].content if self.chat is not None else self.text
        count = len(self.images or ())
        return shortened(text) if text else "a picture" if count == 1 else f"{count} pictures"


class Vector(Body):
    """Where a vector comes from: a difference of two prompts, a token, or a file."""

    prompts: Annotated[list[Text], Field(min_length=2, max_length=2)] | None = None
    token: Token | None = None
    file: Name | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Vector:
        if sum(value is not None for value in (self.prompts, self.token, self.file)) != 1:
            raise ValueError("give one of prompts, token and file")
        return self


class Other(Body):
    """The one thing that is not the same in the other of two readings."""

    prompt: Prompt | None = None
    lens: Name | None = None
    model: Name | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Other:
        if sum(value is not None for value in (self.prompt, self.lens, self.model)) != 1:
            raise ValueError("give one of prompt, lens and model")
        return self


Where = Literal["all", "last", "each"]


class Steer(Body):
    """A vector that is added while a model writes."""

    vector: Vector
    site: SiteText
    strength: Strength = 1.0
    positions: Where = "each"


class Load(Body):
    """Load a model, and say what it is."""

    do: Literal["load"]
    model: Name


class Prompted(Body):
    """What all requests share that read a prompt."""

    model: Name
    prompt: Prompt
    lens: Name = "logit"
    sites: Sites = ["resid"]
    statistics: Annotated[list[Literal["entropy", "kl"]], Field(max_length=2)] = ["entropy", "kl"]
    targets: Annotated[list[Token], Field(max_length=8)] = []
    top_k: Annotated[int, Field(ge=1, le=20)] = 5
    precision: Literal["exact", "screened", "auto"] = "exact"


class Read(Prompted):
    """Read a prompt."""

    do: Literal["read"]


class Compare(Prompted):
    """Read twice, with one thing that is not the same."""

    do: Literal["compare"]
    other: Other


class Patch(Prompted):
    """Put the state of one place of a source's run into the run of the prompt."""

    do: Literal["patch"]
    source: Prompt
    site: SiteText
    position: Place
    source_position: Place


class PatchAll(Prompted):
    """Put states of a clean run (the source) into that of the prompt, each place by itself."""

    do: Literal["patch_all"]
    source: Prompt
    answers: Annotated[list[Token], Field(min_length=1, max_length=2)]


class Steering(Prompted):
    """Read a prompt without and with a vector."""

    do: Literal["steer"]
    vector: Vector
    site: SiteText
    strength: Strength = 1.0
    positions: Where = "all"
    new_tokens: Annotated[int, Field(ge=0, le=4096)] = 0


class Generate(Prompted):
    """Read while the model writes."""

    do: Literal["generate"]
    new_tokens: Tokens = 32
    sample: bool = False
    temperature: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steer: Steer | None = None


Request = Load | Read | Compare | Patch | PatchAll | Steering | Generate

_BODIES: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="do")])


def parse(body: bytes, text_bytes: int = TEXT_BYTES) -> Request:
    """The request that a body of JSON holds.

    What could make the check itself costly is looked for first, in the bytes: a text that is too long, too many values.

    Args:
        body: the bytes.
        text_bytes: how many there may be without the pictures.

    Raises:
        InputError: it is not JSON, or does not fit; the message is one sentence.
    """
    rest = _PICTURES.sub(b'""', body)
    if len(rest) > text_bytes:
        raise InputError(
            f"the request has {len(rest):,} bytes without its pictures; this server takes {text_bytes:,}: shorten it"
        )
    if _STRINGS.sub(b"", rest).count(b",") >= VALUES:
        raise InputError(f"the body does not fit: it has more than {VALUES:,} values")
    try:
        return _BODIES.validate_json(body)
    except ValidationError as error:
        count = error.error_count()
        if count > ERRORS:
            raise InputError(f"the body does not fit: {count:,} of its values are not known or not right") from None
        first = error.errors(include_url=False, include_context=True, include_input=False)[0]
        raise InputError(_sentence(first)) from None


def target_of(text: str) -> str | int:
    """What a text names: a token, or ``id:`` and a number.

    Raises:
        InputError: no number comes after ``id:``.
    """
    if not text.startswith("id:"):
        return text
    digits = text[3:]
    if not digits.isascii() or not digits.isdigit() or len(digits) > 10:
        raise InputError(f"target {shortened(text)!r}: after id: comes a whole number, for instance id:42")
    return int(digits)


def shortened(text: str, most: int = 80) -> str:
    """A text in one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _sentence(error: Any) -> str:
    """What is wrong with a body, in one sentence."""
    kind: str = error["type"]
    if kind == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return "'do' must be one of load, read, compare, patch, patch_all, steer and generate"
    where = ".".join(str(part) for part in error["loc"][1:])  # the first is the kind of request
    if not where:
        return f"the body does not fit: {_said(error)}"
    if kind == "missing":
        return f"'{where}' is missing"
    if kind == "extra_forbidden":
        return f"'{shortened(where)}' is not known in this request"
    return f"'{where}': {_said(error)}"


def _said(error: Any) -> str:
    text: str = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch":
        return "give a PNG, JPEG or WebP picture as data:image/png;base64,..."
    return shortened(text[:1].lower() + text[1:], 200)
