"""A request as a script: complete, and with the same numbers as the app has shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from logitlab.server import requests
from logitlab.server.settings import LOGIT, Settings, Source

_HERE = "as the app calls it: give the path of the {what} instead"


def script(
    request: requests.Request,
    settings: Settings,
    sites: Sequence[str] | None,
    *,
    other_sites: Sequence[str] | None = None,
    site: str | None = None,
) -> str:
    """The script of a request.

    Args:
        request: any but one that loads a model.
        settings: where models, lenses and vectors are from, and how models are loaded.
        sites: the sites that were read; None for the residual stream.
        other_sites: likewise of the other model, where there is one.
        site: where a state is put or a vector is added, where that is done.
    """
    lines = _Script(request, settings, sites, other_sites, site)
    _BODIES[type(request)](lines)
    return lines.text()


class _Script:
    """Lines of a script, and what it imports."""

    def __init__(
        self,
        request: Any,
        settings: Settings,
        sites: Sequence[str] | None,
        other_sites: Sequence[str] | None,
        site: str | None,
    ) -> None:
        self.request, self.settings = request, settings
        self.sites, self.other_sites, self.site = sites, other_sites, site
        self.imports: list[str] = []
        self.lines: list[str] = []
        self.pictures = 0
        self.add(f"model = {self.model(request.model)}", f"prompt = {self.prompt(request.prompt)}")

    def add(self, *lines: str) -> None:
        """More lines."""
        self.lines += lines

    def needs(self, line: str) -> None:
        """One import."""
        if line not in self.imports:
            self.imports.append(line)

    def text(self) -> str:
        """The whole script."""
        first = sorted(line for line in self.imports if not line.startswith("from logitlab"))
        ours = sorted(line for line in self.imports if line.startswith("from logitlab"))
        head = [*first, "", "import logitlab as ll", *ours] if first else ["import logitlab as ll", *ours]
        return "\n".join([*head, "", *self.lines]) + "\n"

    # -- parts ---------------------------------------------------------------------------------

    def model(self, name: str) -> str:
        """The call that loads a model."""
        source = _source(self.settings.models, name)
        options = "".join(f", {key}={value!r}" for key, value in self.settings.options.items())
        return f"ll.load({name!r}{options})" + _where(source, "folder")

    def lens(self, name: str) -> str:
        """The expression of a lens."""
        if name == LOGIT:
            return "ll.LogitLens()"
        more = ", any_weights=True" if self.settings.any_weights else ""
        more += ", allow_pickle=True" if self.settings.allow_pickle else ""
        return f"ll.load_lens({name!r}{more})"

    def prompt(self, prompt: requests.Prompt) -> str:
        """A prompt as a literal."""
        if prompt.chat is not None:
            return repr([{"role": message.role, "content": message.content} for message in prompt.chat])
        if prompt.images is None:
            return repr(prompt.text)
        self.needs("from PIL import Image")
        opened: list[str] = []
        for address in prompt.images:
            self.pictures += 1
            ending = address[len("data:image/") : address.index(";")]
            opened.append(f'Image.open("picture-{self.pictures}.{ending}")')
        text = f'"text": {prompt.text!r}, ' if prompt.text else ""
        return f'{{{text}"images": [{", ".join(opened)}]}}  # the pictures of the request, under these names'

    def options(self, *, lens: bool = True, sites: Sequence[str] | None = None) -> str:
        """Arguments that readings share, as far as they are not the defaults."""
        request: requests.Prompted = self.request
        given: list[str] = []
        if lens and request.lens != LOGIT:
            given.append("lens=lens")
        if sites is not None:
            given.append(f"sites={list(sites)!r}")
        if request.targets:
            given.append(f"target={[requests.target_of(text) for text in request.targets]!r}")
        if request.top_k != 5:
            given.append(f"top_k={request.top_k}")
        if sorted(request.statistics) != ["entropy", "kl"]:
            given.append(f"statistics={list(request.statistics)!r}")
        if request.precision != "exact":
            given.append(f"precision={request.precision!r}")
        return "".join(f", {one}" for one in given)

    def read(self, name: str, model: str = "model", prompt: str = "prompt") -> str:
        """The line of a reading."""
        return f"{name} = ll.read({model}, {prompt}{self.options(sites=self.sites)})"

    def uses_lens(self) -> None:
        """The line of the lens, if it is not the logit lens."""
        if self.request.lens != LOGIT:
            source = _source(self.settings.lenses, self.request.lens)
            self.add(f"lens = {self.lens(self.request.lens)}{_where(source, 'lens')}")

    def vector(self, vector: requests.Vector) -> None:
        """The line of a vector."""
        if vector.file is not None:
            self.needs("from logitlab.vectors import Vectors")
            source = _source(self.settings.vectors, vector.file)
            more = ".for_any_weights()" if self.settings.any_weights else ""
            self.add(f"vector = Vectors.load({vector.file!r}){more}{_where(source, 'file')}")
        elif vector.token is not None:
            self.needs("from logitlab.vectors import lens_directions")
            lens = "" if self.request.lens == LOGIT else ", lens=lens"
            self.add(f"vector = lens_directions(model, {requests.target_of(vector.token)!r}, [prompt], site{lens})")
        else:
            assert vector.prompts is not None
            self.needs("from logitlab.vectors import mean_difference")
            positive, negative = vector.prompts
            self.add(f"vector = mean_difference(model, [{positive!r}], [{negative!r}], site)")

    def outcome(self) -> None:
        """The lines of what a change does to the next token."""
        self.add(
            "",
            "",
            "def final():",
            '    """The model\'s own log-probabilities at the last position."""',
            "    state = ll.capture(model, prompt, model.last_site, positions=-1)[model.last_site]",
            "    return model.tail.logits(state)[0].double().log_softmax(-1)",
            "",
            "",
            "before = final()",
            "with iv.intervene(model, change):",
            "    after = final()",
            'seen = before != -float("inf")  # what cannot come adds nothing',
            "kl = float((before.exp() * (before - after))[seen].sum())  # nats",
        )


def _read(script: _Script) -> None:
    script.uses_lens()
    script.add(script.read("reading"), "print(reading)")


def _compare(script: _Script) -> None:
    request: requests.Compare = script.request
    other = request.other
    script.uses_lens()
    script.add(script.read("first"))
    if other.prompt is not None:
        script.add(f"other = {script.prompt(other.prompt)}", script.read("second", prompt="other"))
    elif other.lens is not None:
        source = _source(script.settings.lenses, other.lens) if other.lens != LOGIT else None
        script.add(f"other = {script.lens(other.lens)}{_where(source, 'lens')}")
        rest = script.options(lens=False, sites=script.sites)
        script.add(f"second = ll.read(model, prompt, lens=other{rest})")
    else:
        assert other.model is not None
        script.add(f"other = {script.model(other.model)}")
        script.add(f"second = ll.read(other, prompt{script.options(sites=script.other_sites)})")
    script.add("print(first)", "print(second)")


def _patch(script: _Script) -> None:
    request: requests.Patch = script.request
    script.needs("from logitlab import interventions as iv")
    script.uses_lens()
    script.add(
        f"source = {script.prompt(request.source)}",
        f"site = {script.site!r}",
        f"state = ll.capture(model, source, site, positions={request.source_position})[site][0]",
        f"change = iv.replace(site, state, positions=[{request.position}])",
        script.read("base"),
        script.read("theirs", prompt="source"),
        "with iv.intervene(model, change):",
        f"    {script.read('patched')}",
        "print(patched)",
    )
    script.outcome()


def _patch_all(script: _Script) -> None:
    request: requests.PatchAll = script.request
    script.needs("from logitlab import interventions as iv")
    script.uses_lens()
    answers = [requests.target_of(text) for text in request.answers]
    told = repr(tuple(answers)) if len(answers) == 2 else repr(answers[0])
    script.add(
        f"clean = {script.prompt(request.source)}",
        script.read("reading"),
        f"found = iv.patch(model, clean, prompt, {told}, sites=list(reading.sites))",
        "print(found.data())",
    )


def _steer(script: _Script) -> None:
    request: requests.Steering = script.request
    script.needs("from logitlab import interventions as iv")
    script.uses_lens()
    _steered(script, request.vector, request.strength, request.positions)
    script.add(
        script.read("plain"),
        "with iv.intervene(model, change):",
        f"    {script.read('steered')}",
        "print(steered)",
    )
    script.outcome()
    if request.new_tokens:
        count = request.new_tokens
        script.add(
            "",
            "",
            "def written():",
            f"    steps = ll.generate(model, prompt, max_new_tokens={count}, do_sample=False)",
            '    return "".join(step.text for step in steps)',
            "",
            "",
            "text = written()",
            "with iv.intervene(model, change):",
            "    steered_text = written()",
        )


def _generate(script: _Script) -> None:
    request: requests.Generate = script.request
    script.uses_lens()
    drawn = "do_sample=False"
    if request.sample:
        drawn = f"do_sample=True, temperature={request.temperature!r}, seed={request.seed}"
    given = f"max_new_tokens={request.new_tokens}, {drawn}{script.options(sites=script.sites)}"
    steps = f"steps = list(ll.generate(model, prompt, {given}))"
    if request.steer is None:
        script.add(steps)
    else:
        script.needs("from logitlab import interventions as iv")
        steer = request.steer
        _steered(script, steer.vector, steer.strength, steer.positions)
        script.add("with iv.intervene(model, change):", f"    {steps}")
    script.add(
        "for step in steps:",
        "    print(repr(step.token), step.logprob, step.reading.rank[0, :, 0, 0].values)",
        'text = "".join(step.text for step in steps)',
    )


def _steered(script: _Script, vector: requests.Vector, strength: float, positions: str) -> None:
    script.add(f"site = {script.site!r}")
    script.vector(vector)
    script.add(f"change = iv.add(site, vector, strength={strength!r}, positions={positions!r})")


_BODIES: dict[type[Any], Any] = {
    requests.Read: _read,
    requests.Compare: _compare,
    requests.Patch: _patch,
    requests.PatchAll: _patch_all,
    requests.Steering: _steer,
    requests.Generate: _generate,
}


def _source(sources: Sequence[Source], name: str) -> Source | None:
    return next((source for source in sources if source.name == name), None)


def _where(source: Source | None, what: str) -> str:
    """A comment where a name alone does not say where something is."""
    if source is None or not source.local:
        return ""
    return "  # " + _HERE.format(what=what)
