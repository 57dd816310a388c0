"""What each request does: from a request and the models to grids, numbers and a script that gives the same.

Nothing here knows how requests come in or where events go.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from typing import Any

import numpy as np
import torch

from logitlab.comparison import common_sites
from logitlab.errors import InputError, OutOfMemoryError
from logitlab.generation import generate
from logitlab.interventions import Intervention, Vectors, add, intervene, patch, replace
from logitlab.lenses import Lens, LogitLens
from logitlab.models.capture import by_tokens, capture
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded
from logitlab.models.sites import INDEXED_KINDS, Site, normalise_request, select_layers
from logitlab.reader import read
from logitlab.reading import Reading, Target
from logitlab.server import python, requests
from logitlab.server.models import Library, can_write, facts, takes_pictures, takes_text
from logitlab.server.pictures import decoded
from logitlab.server.queue import CancelledWorkError, Job
from logitlab.server.settings import LOGIT
from logitlab.targets import resolve_targets, target_notes
from logitlab.vectors import lens_directions, mean_difference
from logitlab.views.grid_data import grid_data, packed
from logitlab.views.tokens import visible

EVERY = 0.1
"""Seconds between two events about progress."""

WRITTEN = "written"
"""What the first target of a step is called, so that the steps make one grid."""

SHOWN = 5
"""Likely tokens before and after that an outcome names."""


def do(request: requests.Request, library: Library, job: Job) -> dict[str, Any]:
    """Do what a request asks for.

    Args:
        request: the request.
        library: the models, lenses and vectors that may be used.
        job: is told of progress and steps; it says when nobody wants the result any more.

    Returns:
        The result, plain values.

    Raises:
        InputError: the request cannot be done; the message says why.
        OutOfMemoryError: there is not enough memory for it.
        CancelledWorkError: nobody wants the result.
    """
    if isinstance(request, requests.Load):
        model = library.model(request.model, _Progress(job).say)
        return facts(model, request.model)
    begun = time.perf_counter()
    work = _Work(request, library, job)
    try:
        result = _KINDS[type(request)](work)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        raise OutOfMemoryError(
            f"there is not enough memory on {work.model.device} for this: shorten the prompt, or name fewer sites"
        ) from error
    seconds = {"reading": round(work.seconds, 4), "total": round(time.perf_counter() - begun, 4)}
    return {**result, "notes": work.notes, "seconds": seconds}


class _Progress:
    """Tells of progress, not too often; every call says whether the work is still wanted."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._last = 0.0

    def say(self, what: str) -> None:
        """What goes on while a model is loaded, which goes on also when nobody listens: others will want it."""
        with suppress(CancelledWorkError):
            self._job.tell("progress", {"what": what, "done": 0, "total": 0})

    def of(self, what: str) -> Callable[[int, int], None]:
        """What the library's functions call with numbers done and in all."""

        def progress(done: int, total: int) -> None:
            self._job.check()
            now = time.monotonic()
            if (done == total or now - self._last >= EVERY) and self._job.room():
                self._last = now
                self._job.tell("progress", {"what": what, "done": done, "total": total})

        return progress


@dataclass
class _Input:
    """A prompt for one model: what `logitlab.read` is given, and what it comes to."""

    given: Any
    encoded: Encoded


@dataclass
class _Work:
    """One request at work.

    Attributes:
        request: the request.
        library: what may be used.
        job: who is told.
        notes: sentences for the user.
        seconds: that readings took.
    """

    request: Any
    library: Library
    job: Job
    notes: list[str] = field(default_factory=list[str])
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.progress = _Progress(self.job)
        self.model = self.library.model(self.request.model, self.progress.say)
        self.job.check()
        self.lens = self.library.lens(self.request.lens)
        self.targets = [requests.target_of(text) for text in self.request.targets]
        self.input = self.prepared(self.request.prompt)

    # -- inputs --------------------------------------------------------------------------------

    def prepared(self, prompt: requests.Prompt, model: Model | None = None, what: str = "the prompt") -> _Input:
        """A prompt as a model takes it, within the limits."""
        model = self.model if model is None else model
        limits = self.library.settings.limits
        texts = [m.content for m in prompt.chat] if prompt.chat is not None else [prompt.text or ""]
        characters = sum(map(len, texts))
        if characters > limits.prompt_characters:
            raise InputError(
                f"{what} has {characters:,} characters; this server takes {limits.prompt_characters:,}: shorten it"
            )
        given: Any
        if prompt.images is not None:
            if not takes_pictures(model):
                raise InputError(f"{model.name} reads no pictures: give a text")
            given = {"images": decoded(prompt.images, limits)} | ({} if not prompt.text else {"text": prompt.text})
        else:
            if not takes_text(model):
                raise InputError(f"{model.name} reads no text: give a picture")
            chat = prompt.chat
            given = prompt.text if chat is None else [{"role": m.role, "content": m.content} for m in chat]
        encoded = model.encode(given)[0]
        tokens = len(encoded.ids) + len(encoded.encoder_ids or ())
        if tokens > limits.prompt_tokens:
            raise InputError(f"{what} has {tokens:,} tokens; this server takes {limits.prompt_tokens:,}: shorten it")
        return _Input(given, encoded)

    def sites(self, *lenses: Lens, model: Model | None = None) -> list[str] | None:
        """The sites to read; None for those of the residual stream."""
        model = self.model if model is None else model
        if self.request.sites != ["resid"]:
            return list(self.request.sites)
        if all(isinstance(lens, LogitLens) for lens in lenses):
            return None
        found = common_sites(model, {str(n): lens for n, lens in enumerate(lenses)})
        return None if found == [str(site) for site in model.select_sites(None)] else found

    def check_size(
        self, inputs: _Input, sites: Sequence[str] | None, model: Model | None = None, *, new_tokens: int = 0
    ) -> int:
        """Raise `InputError` if a reading would be larger than this server makes them; gives its number of cells."""
        model = self.model if model is None else model
        most = self.library.settings.limits.cells
        named = _count(model, sites)
        if named > most:  # so many are not even listed
            raise InputError(f"{named:,} sites are named; this server reads {most:,} cells: name fewer sites")
        chosen = model.select_sites(sites)
        count = len(chosen) + (model.last_site not in chosen)
        positions = max(1, len(inputs.encoded.ids)) + new_tokens
        if count * positions > most:
            new = f", {new_tokens:,} of them new," if new_tokens else ""
            raise InputError(
                f"{count:,} sites at {positions:,} positions{new} are {count * positions:,} cells; this server reads "
                f"{most:,}: name fewer sites, or shorten the prompt"
            )
        return count * positions

    def check_tokens(self, what: str) -> None:
        """Raise `InputError` unless the model is read token by token, which changing its states needs."""
        if not by_tokens(self.model, [self.input.encoded]):
            raise InputError(f"{self.model.name} is not read token by token, so it cannot be {what} here")

    def check_writing(self, new_tokens: int) -> None:
        """Raise `InputError` unless so many tokens can be written."""
        most = self.library.settings.limits.new_tokens
        if new_tokens > most:
            raise InputError(f"{new_tokens:,} new tokens are wanted; this server writes {most:,}")
        if not can_write(self.model):
            raise InputError(f"{self.model.name} cannot write: it has no generate()")
        limit = self.model.context_length
        if limit is not None and len(self.input.encoded.ids) + new_tokens > limit:
            raise InputError(
                f"the prompt has {len(self.input.encoded.ids):,} tokens, and with {new_tokens:,} new ones it is longer "
                f"than the {limit:,} that the model's context holds: want fewer"
            )

    def site(self, text: str) -> Site:
        """The one site that a text names."""
        count = _count(self.model, [text])
        if count > 1:
            raise InputError(f"{text!r} is {count:,} sites: name one, {self.model.last_site} for instance")
        return self.model.select_sites(text)[0]

    # -- readings ------------------------------------------------------------------------------

    def options(self, lens: Lens | None = None, sites: Sequence[str] | None = None) -> dict[str, Any]:
        """Arguments that readings share."""
        return {
            "lens": self.lens if lens is None else lens,
            "sites": None if sites is None else list(sites),
            "target": self.targets or None,
            "top_k": self.request.top_k,
            "statistics": list(self.request.statistics),
            "precision": self.request.precision,
        }

    def read(
        self,
        inputs: _Input,
        sites: Sequence[str] | None,
        what: str = "reading",
        *,
        model: Model | None = None,
        lens: Lens | None = None,
    ) -> Reading:
        """One reading."""
        model = self.model if model is None else model
        self.check_size(inputs, sites, model)
        self.job.check()
        with self.timed():
            found = read(model, inputs.given, **self.options(lens, sites), progress=self.progress.of(what))
        if model.space.name == "vocabulary" and model.tokenizer is not None:
            self.notes += [note for note in target_notes(model, found.targets) if note not in self.notes]
        return found

    @contextmanager
    def timed(self) -> Generator[None]:
        """Counts as reading."""
        begun = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begun

    def script(self, sites: Sequence[str] | None, **more: Any) -> str:
        """The script that gives the same."""
        return python.script(self.request, self.library.settings, sites, **more)


# -- kinds of requests -------------------------------------------------------------------------------


def _read(work: _Work) -> dict[str, Any]:
    request: requests.Read = work.request
    sites = work.sites(work.lens)
    reading = work.read(work.input, sites)
    return {"grids": [_grid(request.prompt.title, reading)], "python": work.script(sites)}


def _compare(work: _Work) -> dict[str, Any]:
    request: requests.Compare = work.request
    other = request.other
    if other.prompt is not None:
        inputs = work.prepared(other.prompt, what="the other prompt")
        sites = work.sites(work.lens)
        work.check_size(inputs, sites)
        pair = [work.read(work.input, sites), work.read(inputs, sites, "reading the other prompt")]
        titles = [request.prompt.title, other.prompt.title]
    elif other.lens is not None:
        lens = work.library.lens(other.lens)
        sites = work.sites(work.lens, lens)
        pair = [work.read(work.input, sites), work.read(work.input, sites, "reading through the other", lens=lens)]
        titles = [_lens_title(request.lens), _lens_title(other.lens)]
    else:
        assert other.model is not None
        sites = work.sites(work.lens)
        first = work.read(work.input, sites)
        model = work.library.model(other.model, work.progress.say)
        work.job.check()
        inputs = work.prepared(request.prompt, model)
        second = None if request.sites == ["resid"] and sites is None else work.sites(work.lens, model=model)
        pair = [first, work.read(inputs, second, "reading the other model", model=model)]
        titles = [request.model, other.model]
        return {"grids": _grids(titles, pair), "python": work.script(sites, other_sites=second)}
    return {"grids": _grids(titles, pair), "python": work.script(sites)}


def _patch(work: _Work) -> dict[str, Any]:
    request: requests.Patch = work.request
    work.check_tokens("patched")
    site = work.site(request.site)
    source = work.prepared(request.source, what="the source")
    sites = work.sites(work.lens)
    for inputs in (work.input, source):
        work.check_size(inputs, sites)
    state = capture(work.model, source.given, site, positions=request.source_position)[site]
    change = replace(str(site), state[0], positions=[_place(request.position, work.input, "the prompt")])
    base = work.read(work.input, sites)
    theirs = work.read(source, sites, "reading the source")
    with intervene(work.model, change):
        patched = work.read(work.input, sites, "reading with the state put in")
    outcome = _outcome(work, change)
    where = f"{site} at {request.position} from {request.source_position} of the source"
    titles = [request.prompt.title, f"patched: {where}", request.source.title]
    return {
        "grids": _grids(titles, [base, patched, theirs]),
        "outcome": outcome,
        "python": work.script(sites, site=str(site)),
    }


def _patch_all(work: _Work) -> dict[str, Any]:
    request: requests.PatchAll = work.request
    work.check_tokens("patched")
    source = work.prepared(request.source, what="the source")
    ours, theirs = len(work.input.encoded.ids), len(source.encoded.ids)
    if ours != theirs:
        raise InputError(
            f"the prompt has {ours:,} tokens and the source {theirs:,}: where a state belongs can only be told if they "
            "have as many"
        )
    sites = work.sites(work.lens)
    places, most = work.check_size(work.input, sites), work.library.settings.limits.places
    if places > most:
        raise InputError(
            f"{places:,} places would be patched, each by a pass of its own; this server patches {most:,}: name fewer "
            "sites, or shorten the prompts"
        )
    reading = work.read(work.input, sites)
    answers = [requests.target_of(text) for text in request.answers]
    found = patch(
        work.model,
        source.given,
        work.input.given,
        tuple(answers) if len(answers) == 2 else answers[0],
        sites=list(reading.sites),
        progress=work.progress.of("patching"),
    )
    recovery = found.recovery[0].astype(np.float32)
    if not np.isfinite(recovery).any():
        work.notes.append("both runs give the answer the same value: there is nothing to recover")
    grid = _grid(f"{request.prompt.title}, patched from {request.source.title}", reading)
    grid["data"]["prompts"][0]["heat"] = {
        "name": "recovery",
        "unit": "1",
        "low": 0,
        "high": 1,
        "values": packed(recovery),
    }
    return {
        "grids": [grid],
        "clean": float(found.clean[0]),
        "corrupted": float(found.corrupted[0]),
        "python": work.script(sites),
    }


def _steer(work: _Work) -> dict[str, Any]:
    request: requests.Steering = work.request
    work.check_tokens("steered")
    if request.new_tokens:
        work.check_writing(request.new_tokens)
    site = work.site(request.site)
    sites = work.sites(work.lens)
    work.check_size(work.input, sites)
    vectors = _vectors(work, request.vector, site)
    change = add(str(site), vectors, strength=request.strength, positions=request.positions)
    plain = work.read(work.input, sites)
    with intervene(work.model, change):
        steered = work.read(work.input, sites, "reading with the vector")
    result: dict[str, Any] = {
        "grids": _grids([request.prompt.title, f"steered: {site}, strength {request.strength:g}"], [plain, steered]),
        "outcome": _outcome(work, change),
        "norm": _norm(work, vectors, site, request.positions),
        "python": work.script(sites, site=str(site)),
    }
    if request.new_tokens:
        result["texts"] = [
            _written(work, request.new_tokens, None, "writing"),
            _written(work, request.new_tokens, change, "writing with the vector"),
        ]
    return result


def _generate(work: _Work) -> dict[str, Any]:
    request: requests.Generate = work.request
    work.check_writing(request.new_tokens)
    sites = work.sites(work.lens)
    work.check_size(work.input, sites, new_tokens=request.new_tokens)
    change: list[Intervention] = []
    site: Site | None = None
    if request.steer is not None:
        steer = request.steer
        site = work.site(steer.site)
        vectors = _vectors(work, steer.vector, site)
        change.append(add(str(site), vectors, strength=steer.strength, positions=steer.positions))
    drawn = {"do_sample": False}
    if request.sample:
        drawn = {"do_sample": True, "temperature": request.temperature, "seed": request.seed}
    texts: list[str] = []
    targets = resolve_targets(work.model, work.targets or None, work.model.columns)
    with _changed(work.model, change), work.timed():
        steps = generate(
            work.model, work.input.given, max_new_tokens=request.new_tokens, **drawn, **work.options(sites=sites)
        )
        try:
            for index, step in enumerate(steps):
                texts.append(step.text)
                data = grid_data(_with_targets(step.reading, targets))
                if index:  # what does not change is told once
                    data["provenance"] = []
                    data["prompts"][0] |= {"text": "", "pictures": []}
                told = {
                    "index": index,
                    "token": visible(step.token),
                    "id": step.token_id,
                    "text": step.text,
                    "logprob": step.logprob,
                    "data": data,
                }
                work.job.wait()
                work.job.tell("step", told)
        finally:
            steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    return {"text": "".join(texts), "python": work.script(sites, site=None if site is None else str(site))}


_KINDS: dict[type[Any], Callable[[_Work], dict[str, Any]]] = {
    requests.Read: _read,
    requests.Compare: _compare,
    requests.Patch: _patch,
    requests.PatchAll: _patch_all,
    requests.Steering: _steer,
    requests.Generate: _generate,
}


# -- parts -------------------------------------------------------------------------------------------


def _with_targets(reading: Reading, targets: Sequence[Target]) -> Reading:
    """The reading of a step with the same targets as that of every other step: the token written, then those wanted."""
    there = [target.id for target in reading.targets]
    columns = [0, *(there.index(target.id) for target in targets)]  # what was written may be one of those wanted
    arrays = {name: reading.arrays[name][..., columns] for name in ("target_logprob", "target_rank")}
    return replace_fields(reading, targets=(Target(-1, WRITTEN), *targets), arrays={**reading.arrays, **arrays})


def _grid(title: str, reading: Reading) -> dict[str, Any]:
    return {"title": title, "data": grid_data(reading)}


def _grids(titles: Sequence[str], readings: Sequence[Reading]) -> list[dict[str, Any]]:
    return [_grid(title, reading) for title, reading in zip(titles, readings, strict=True)]


def _lens_title(name: str) -> str:
    return "logit lens" if name == LOGIT else name


def _count(model: Model, sites: Sequence[str] | None) -> int:
    """How many sites are named, without listing them; one that is named twice counts twice."""
    count = 0
    for spec in normalise_request(sites):
        for layer in select_layers(spec, model.n_layers):
            if not model.offers(layer, spec.kind):
                continue
            parts = 1
            if spec.kind in INDEXED_KINDS and spec.index is None:
                block = model.parts[layer]
                projection = block.heads if spec.kind == "head_out" else block.neurons
                parts = 1 if projection is None else projection.parts
            count += parts
    return count


def _place(position: int, inputs: _Input, what: str) -> int:
    count = len(inputs.encoded.ids)
    if not -count <= position < count:
        raise InputError(f"position {position} is beyond {what}, which has {count} tokens (0 to {count - 1})")
    return position


def _vectors(work: _Work, vector: requests.Vector, site: Site) -> Vectors:
    """The vector that a request names, for one site."""
    if vector.file is not None:
        found = work.library.vectors_of(vector.file)
        found.check(work.model)
        return found.alone(site)
    if vector.token is not None:
        return lens_directions(
            work.model, requests.target_of(vector.token), [work.input.given], str(site), lens=work.lens
        )
    assert vector.prompts is not None
    positive, negative = (
        work.prepared(requests.Prompt(text=text), what=what)
        for text, what in zip(vector.prompts, ("the positive text", "the negative text"), strict=True)
    )
    return mean_difference(work.model, [positive.given], [negative.given], str(site))


def _norm(work: _Work, vectors: Vectors, site: Site, positions: str) -> dict[str, float]:
    """Euclidean lengths: of the vector, and the median one of the states that it is added to in the prompt.

    Not the mean: the first token's state is often a hundred times as long as all others.
    """
    where = None if positions == "all" else -1
    states = capture(work.model, work.input.given, site, positions=where)[site]
    return {"vector": vectors.norm(site), "states": float(states.double().norm(dim=-1).median())}


def _final(work: _Work) -> torch.Tensor:
    """The model's own log-probabilities at the last position, [V] float64."""
    last = work.model.last_site
    state = capture(work.model, work.input.given, last, positions=-1)[last]
    with work.model.exclusive(), torch.no_grad():
        return work.model.tail.logits(state)[0].double().log_softmax(-1).cpu()


def _outcome(work: _Work, change: Intervention) -> dict[str, Any]:
    """What a change does to the next token: the likeliest ones before and after, and KL(before || after) in nats."""
    before = _final(work)
    with intervene(work.model, change):
        after = _final(work)
    work.job.check()
    count = min(SHOWN, len(before))
    ids = dict.fromkeys([*after.topk(count).indices.tolist(), *before.topk(count).indices.tolist()])
    label = work.model.columns.label
    space = "·" if work.model.space.name == "vocabulary" else " "
    tokens = [
        {
            "token": visible(label(i), space=space),
            "id": i,
            "before": float(before[i].exp()),
            "after": float(after[i].exp()),
        }
        for i in ids
    ]
    return {"tokens": tokens, "kl": _divergence(before, after)}


def _divergence(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """KL(before || after) of log-probabilities [V], nats; None where it is no number or infinite."""
    seen = before != -torch.inf  # what cannot come adds nothing
    found = float((before.exp() * (before - after))[seen].sum())
    return max(0.0, found) if math.isfinite(found) else None


def _written(work: _Work, new_tokens: int, change: Intervention | None, what: str) -> str:
    """What the model writes, taking the likeliest token each time."""
    texts: list[str] = []
    progress = work.progress.of(what)
    with _changed(work.model, [] if change is None else [change]):
        steps = generate(
            work.model,
            work.input.given,
            max_new_tokens=new_tokens,
            do_sample=False,
            sites=str(work.model.last_site),
            top_k=1,
            statistics=(),
        )
        try:
            for step in steps:
                texts.append(step.text)
                progress(len(texts), new_tokens)
        finally:
            steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    return "".join(texts)


@contextmanager
def _changed(model: Model, changes: Sequence[Intervention]) -> Generator[None]:
    """Interventions, or none at all."""
    if not changes:
        yield
        return
    with intervene(model, changes):
        yield
