"""Read while a model writes: one reading for every new token, from the pass that made it.

The Transformers library does the generating, with its own cache, sampling and stopping; states are taken from its
passes as they happen, so no pass is run twice. It runs in a thread that works only while the next token is waited
for: between tokens the model is free, and nothing of ours is on it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from logitlab.errors import InputError, LogitlabError, ModelError
from logitlab.lenses.base import Lens
from logitlab.logits import statistics as statistics_of
from logitlab.logits.choose import choose
from logitlab.logits.statistics import MAX_ERROR
from logitlab.models.capture import activations_of, by_tokens, keys_of
from logitlab.models.handle import Model
from logitlab.models.hooks import Taps, hidden_input
from logitlab.models.inputs import Encoded, whole_number
from logitlab.models.interfere import active
from logitlab.models.passes import Part, arguments_of, stopped
from logitlab.models.sites import Site
from logitlab.models.watch import Key, watch
from logitlab.plan import STATISTICS, Plan, check_answers, check_finite, plan_of, prompt_of
from logitlab.reading import Prompt, Reading, Target
from logitlab.table import Table
from logitlab.targets import VocabularyFilter

OURS = (
    "assistant_model",
    "custom_generate",
    "guidance_scale",
    "penalty_alpha",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "return_dict_in_generate",
    "streamer",
    "synced_gpus",
)
"""Options of Transformers' ``generate`` by which it does not write one token a pass, or that are needed here."""

CONTEXT = 8
"""Tokens before a new one that decide what it is called: characters can be split over several."""


@dataclass(frozen=True)
class Step:
    """One new token.

    Attributes:
        token_id: its id.
        token: its label.
        text: what it adds to the text: nothing, if it begins a character that the next one ends.
        logprob: its log-probability by the model itself, nats, before temperature or any other change.
        reading: one prompt (all that came before it) at one position, the one that it was predicted from. The token
            is the first target, so its log-probability and rank are there for every site.
    """

    token_id: int
    token: str
    text: str
    logprob: float
    reading: Reading


def generate(
    model: Model,
    inputs: Any,
    *,
    max_new_tokens: int = 64,
    seed: int | None = None,
    lens: Lens | None = None,
    sites: str | Site | Iterable[str | Site] | None = None,
    target: str | int | Sequence[str | int] | None = None,
    top_k: int = 5,
    statistics: str | Iterable[str] = STATISTICS,
    vocabulary: VocabularyFilter | None = None,
    decoder: Any = None,
    precision: str = "exact",
    max_error: float = MAX_ERROR,
    backend: str = "auto",
    **options: Any,
) -> Iterator[Step]:
    """Let a model write, and read every new token where it was made.

    Args:
        model: a handle from `logitlab.load` or `logitlab.wrap`, of a model that Transformers can generate with.
        inputs: one prompt in any form that `logitlab.read` takes: a text, chat messages, token ids, a picture and text.
        max_new_tokens: most tokens to write; an end-of-text token ends earlier, and is the last step.
        seed: for sampling. What others draw from PyTorch's random numbers between two tokens changes nothing.
        lens: as in `logitlab.read`.
        sites: as in `logitlab.read`.
        target: tokens to follow beside the one that is written, as in `logitlab.read`.
        top_k: as in `logitlab.read`.
        statistics: as in `logitlab.read`.
        vocabulary: as in `logitlab.read`.
        decoder: as in `logitlab.read`.
        precision: as in `logitlab.read`.
        max_error: as in `logitlab.read`.
        backend: as in `logitlab.read`.
        options: what Transformers' ``generate`` takes: ``do_sample``, ``temperature``, ``top_p``,
            ``repetition_penalty``, ``stopping_criteria``, ... By default the model's own settings hold, without beams.

    Returns:
        The steps, made as they are asked for. Stop asking (``break``) and the generation ends.

    Raises:
        InputError: an argument cannot be used, or there is more than one prompt.
        ModelError: hidden states are not finite.
        VerificationError: the states that were read are not those that the model went on from.

    Example:
        ``for step in generate(model, "The capital of France is", max_new_tokens=5): print(step.token)``
    """
    if not hasattr(model.module, "generate"):
        raise InputError(f"{model.name} has no generate(): only models of the Transformers library that can write do")
    bad = [name for name in OURS if options.get(name) is not None]
    bad += [name for name in ("num_beams", "num_return_sequences") if options.get(name, 1) != 1]
    if bad:
        raise InputError(f"{bad[0]} cannot be used here: tokens are written one a pass, in one sequence")
    max_new_tokens = whole_number(max_new_tokens, "max_new_tokens")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if seed is not None and not 0 <= whole_number(seed, "seed") < 2**63:
        raise InputError(f"seed is {seed}; it must be at least 0 and below 2**63")
    prompts = model.encode(inputs, decoder=decoder)
    if len(prompts) != 1:
        raise InputError(f"generate() writes one text at a time, and {len(prompts)} prompts were given")
    if not by_tokens(model, prompts):
        raise InputError(f"{model.name} is not read token by token: it cannot be read while it writes")
    plan = plan_of(
        model,
        prompts,
        lens=lens,
        sites=sites,
        target=target,
        top_k=top_k,
        statistics=statistics,
        vocabulary=vocabulary,
        precision=precision,
        max_error=max_error,
        backend=backend,
    )
    plan.settings["backend"] = choose(backend, plan.source)
    plan.provenance["generation"] = {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        **{name: value for name, value in options.items() if isinstance(value, bool | int | float | str)},
    }
    wanted = {"num_beams": 1, **options, "max_new_tokens": max_new_tokens}
    return _steps(_Writer(plan, prompts[0], wanted, seed), active(model.module))


def _steps(writer: _Writer, begun: list[Any]) -> Iterator[Step]:
    """What a writer makes, one at a time; ``begun`` is what changes the model's passes."""
    context = copy_context()  # interventions belong to the context that they were begun in
    thread = threading.Thread(target=context.run, args=(writer.run,), name="logitlab-generate", daemon=True)
    thread.start()
    try:
        while True:
            writer.model.check_free()
            if active(writer.model.module) != begun:
                raise InputError(
                    "this generation was begun with other interventions than there are now: ask for all of its tokens "
                    "in the block that it is begun in"
                )
            writer.go.release()
            item = writer.made.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        writer.closed = True
        writer.go.release()
        thread.join()


class _Closed(BaseException):
    """Nobody asks for more."""


class _Writer:
    """Runs the generation in a thread of its own, which works only between ``go`` and what it puts into ``made``."""

    def __init__(self, plan: Plan, prompt: Encoded, options: dict[str, Any], seed: int | None) -> None:
        self.plan, self.prompt, self.options = plan, prompt, options
        self.model = plan.model
        self.go = threading.Semaphore(0)
        self.made: SimpleQueue[Step | BaseException | None] = SimpleQueue()
        self.closed = False
        self._keys = keys_of(self.model, plan.sites)
        self._held = ExitStack()
        self._taps: Taps | None = None
        self._has_run = False
        self._states: dict[Key, torch.Tensor] = {}
        self._went_on: torch.Tensor | None = None
        self._passes: deque[tuple[dict[Key, torch.Tensor], torch.Tensor | None]] = deque()
        self._context: list[int] | None = None
        self._base = prompt_of(self.model, prompt, ())
        self._written: list[int] = []
        self._labels: list[str] = []
        self._shown = (0, 0)
        self._seed = seed or 0
        self._random = None if seed is None else [torch.Generator().manual_seed(seed).get_state()]

    # -- the thread ----------------------------------------------------------------------------

    def run(self) -> None:
        """Generate to the end, or until nobody asks for more."""
        self.go.acquire()
        last: BaseException | None = None
        try:
            if not self.closed:
                with ExitStack() as whole:
                    whole.callback(self._free)
                    self._take()
                    self._generate()
        except _Closed:
            pass
        except BaseException as error:  # it is raised where the steps are asked for
            last = error
        finally:
            self.made.put(last)

    def _take(self) -> None:
        """Make the model ours."""
        self._held.enter_context(self.model.exclusive())
        self._exchange_random()
        self._attach()

    def _free(self) -> None:
        """Leave the model to others, with nothing of ours on it."""
        self._detach()
        self._exchange_random()
        self._held.close()

    def _hand(self, step: Step) -> None:
        """Give a step away, and wait until the next one is wanted."""
        self._free()
        if not self.closed:
            self.made.put(step)
            self.go.acquire()
        self._take()
        if self.closed:
            raise _Closed

    def _generate(self) -> None:
        model = self.model
        inputs = arguments_of(model, [self.prompt])
        for name in model.template.options:  # of a single pass: without a cache, say
            inputs.pop(name, None)
        config: Any = getattr(model.module, "generation_config", None)
        options = dict(self.options)
        if getattr(config, "pad_token_id", None) is None and "pad_token_id" not in options:
            end: Any = options.get("eos_token_id", getattr(config, "eos_token_id", None))
            options["pad_token_id"] = end[0] if isinstance(end, list) and end else end
        processors: Any = [*(options.pop("logits_processor", None) or []), _passed(self)]
        module: Any = model.module
        try:
            module.generate(**(inputs | options), logits_processor=_processors(processors), streamer=self)
        except (LogitlabError, _Closed):
            raise
        except Exception as error:  # a model's own code can raise anything
            if not self._has_run:
                why = " ".join(str(error).split())[:300]
                raise InputError(f"Transformers does not generate with these options: {why}") from error
            raise stopped(model, inputs, error) from error

    def put(self, value: torch.Tensor) -> None:
        """What Transformers calls with the prompt, and then with every new token."""
        if self._context is None:
            self._context = value.flatten().tolist()
            return
        for token in value.flatten().tolist():
            self._hand(self._step(int(token)))

    def end(self) -> None:
        """What Transformers calls at the end."""

    def _exchange_random(self) -> None:
        """Exchange PyTorch's random numbers with those of this generation, if it has its own."""
        if self._random is None:
            return
        theirs = [torch.get_rng_state()]
        torch.set_rng_state(self._random[0])
        device = self.model.device
        if device.type in ("cuda", "mps"):  # what is drawn there comes from another generator
            place: Any = torch.cuda if device.type == "cuda" else torch.mps
            which = [device] if device.type == "cuda" else []
            theirs.append(place.get_rng_state(*which))
            if len(self._random) > 1:
                place.set_rng_state(self._random[1], *which)
            else:
                place.manual_seed(self._seed)
        self._random = theirs

    # -- states --------------------------------------------------------------------------------

    def _attach(self) -> None:
        self._taps = Taps()
        watch(self.model, self._keys, self._keep, self._taps)
        head = self.model.tail.head_module
        if head is not None:
            self._taps.before(head, self._note)

    def _detach(self) -> None:
        if self._taps is not None:
            self._taps.__exit__()
            self._taps = None

    def _keep(self, key: Key, value: torch.Tensor, scale: float = 1.0) -> None:
        self._has_run = True
        if key[1] in ("resid_pre", "resid_post") and value.ndim == 4:  # several residual streams
            value = self.model.stack.layout.rows(value)
        row = value.reshape(-1, value.shape[-1])[-1:].detach()
        self._states[key] = row.clone() if scale == 1.0 else row * scale

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = hidden_input(args, kwargs)
        self._went_on = None if given is None else given.reshape(-1, given.shape[-1])[-1:].detach().clone()

    def passed(self) -> None:
        """A pass has been made: its states wait until its token is known."""
        self._passes.append((self._states, self._went_on))
        self._states, self._went_on = {}, None
        self._detach()  # modules that serve several layers are told apart by counting their calls in one pass
        self._attach()

    # -- steps ---------------------------------------------------------------------------------

    def _step(self, token: int) -> Step:
        """The reading of the pass that a token came from."""
        model, context = self.model, self._context
        assert context is not None
        states, went_on = self._passes.popleft()
        missing = [key for key in self._keys if key not in states]
        if missing:
            raise ModelError(
                f"layer {missing[0][0]} was not reached while generating (its {missing[0][1]} was not seen)"
            )
        position = len(context) - 1
        part = Part(((0,),), ((position,),), states, went_on)
        plan = self._plan(token)
        activations = activations_of(model, part, [replace(self.prompt, ids=tuple(context))], plan.sites)
        check_finite(activations, part.owners)
        check_answers(model, activations, part.owners)
        table = Table([[position]], len(plan.sites))
        for rows, result in plan.decoded(activations):
            table.put(part, rows, result)
        reading = plan.reading([self._prompt(position)], table.arrays)
        if plan.own:
            final = model.tail.prepare(activations.kept[model.last_site.layer, model.last_site.kind])
            ids = torch.tensor([token])
            found = statistics_of(final.unsqueeze(0), model.tail.source, top_k=1, targets=ids, entropy=False)
            assert found.target_logprob is not None
            logprob = float(found.target_logprob[0, 0, 0])
        else:
            logprob = float(table.arrays["target_logprob"][0, -1, 0, 0])
        label, text = self._written_down(token)
        return Step(token, label, text, logprob, reading)

    def _plan(self, token: int) -> Plan:
        """The plan of one step: the token is the first target."""
        plan = self.plan
        settings = dict(plan.settings)
        provenance = plan.provenance | {"settings": settings}
        if plan.own:
            return replace(plan, settings=settings, provenance=provenance)
        targets = [Target(token, plan.columns.label(token)), *(t for t in plan.targets if t.id != token)]
        asked = replace(plan.asked, targets=torch.tensor([t.id for t in targets], dtype=torch.long))
        return replace(plan, targets=targets, asked=asked, settings=settings, provenance=provenance)

    def _prompt(self, position: int) -> Prompt:
        """All that came before the new token."""
        base, context = self._base, self._context
        assert context is not None
        if len(base.tokens) > len(context) or not base.tokens:  # Transformers has changed the prompt
            base = replace(base, tokens=tuple(self.model.vocabulary.labels(context)))
        ours = (*base.tokens, *self._labels)
        if len(ours) != len(context):
            ours = tuple(self.model.vocabulary.labels(context))
        return replace(base, ids=tuple(context), tokens=ours, positions=(position,))

    def _written_down(self, token: int) -> tuple[str, str]:
        """Put a token behind the text; its label, and what it adds."""
        context = self._context
        assert context is not None
        context.append(token)
        self._written.append(token)
        some = context[-CONTEXT:] if len(self._written) >= CONTEXT else context[-len(self._written) :]
        labels = self.model.vocabulary.labels(some)
        self._labels[len(self._written) - len(some) :] = labels
        tokenizer: Any = self.model.tokenizer
        if tokenizer is None:
            return labels[-1], labels[-1]
        first, shown = self._shown
        text: str = tokenizer.decode(self._written[first:], skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return labels[-1], ""
        self._shown = (shown, len(self._written))  # what was shown last is the context in which the next is read
        context_text: str = tokenizer.decode(self._written[first:shown], skip_special_tokens=True)
        return labels[-1], text[len(context_text) :]


def _passed(writer: _Writer) -> Any:
    """A logits processor, which Transformers calls after every pass, that changes nothing."""
    from transformers import LogitsProcessor

    class Passed(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
            writer.passed()
            return scores

    return Passed()


def _processors(items: list[Any]) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList(items)
