"""Trials: many interventions tried on the same prompts, side by side in one batch.

What is done at the last token of a prompt changes no token before it, since a decoder looks back only. So the model
goes through those once, and a trial costs the last token and what is written after it. That needs a model which goes on
from its cache as without a break (`logitlab.models.passes.continues`); others go through the whole prompt each time. On
processors products are oneDNN's (`logitlab.models.products`), whose last bits are not those of a reading.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from logitlab.errors import InputError, LogitlabError, ModelError
from logitlab.interventions.apply import intervene
from logitlab.interventions.intervention import Intervention
from logitlab.models.capture import by_tokens
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded, whole_number
from logitlab.models.output import output_of
from logitlab.models.passes import arguments_of, cache_of, continues, stopped
from logitlab.models.products import QuickGradients

ROWS = 256
"""Sequences that go through a model together, at most."""

FEWEST = 4
"""Tokens of a prompt from which it can be told whether a model goes on from its cache."""

LATE = ("last", "each", "generated")
"""Positions that begin at the last token of a prompt."""

Trial = Sequence[Intervention]
"""What is done in one trial; nothing at all is the model as it is."""


@dataclass
class _Group:
    """Prompts of as many tokens.

    Attributes:
        numbers: which prompts.
        cache: what the model hands on after all tokens but the last; None where it has to see them again.
        state: of the model when the cache was made, so that a model that has changed since is seen; None at first.
    """

    numbers: list[int]
    cache: Any = None
    state: int | None = None


class Trials:
    """Prompts on which interventions are tried.

    Args:
        model: a model that is read token by token.
        inputs: prompts in any form that `logitlab.read` takes.
        rows: sequences that go through the model together, at most.

    Raises:
        InputError: an argument cannot be used.

    Example:
        ``plain, steered = Trials(model, prompts).write([[], [add("8.resid_post", v, positions="each")]], 5)``
    """

    def __init__(self, model: Model, inputs: Any, *, rows: int = ROWS) -> None:
        if whole_number(rows, "rows") < 1:
            raise InputError(f"rows is {rows}; it must be at least 1")
        self.model, self.rows = model, rows
        self.prompts: tuple[Encoded, ...] = tuple(model.encode(inputs))
        if not by_tokens(model, self.prompts) or any(p.extra for p in self.prompts):
            raise InputError(
                f"trials need prompts of tokens alone, and a model that answers each; {model.name} does not"
            )
        lengths: dict[tuple[int, int], list[int]] = defaultdict(list)
        for n, p in enumerate(self.prompts):
            lengths[len(p.ids), len(p.encoder_ids or ())].append(n)
        some = [numbers[i : i + rows] for numbers in lengths.values() for i in range(0, len(numbers), rows)]
        self._groups = [_Group(numbers) for numbers in some]
        self._longest = max(self.prompts, key=lambda p: len(p.ids))

    def __len__(self) -> int:
        return len(self.prompts)

    def write(
        self, trials: Sequence[Trial], new_tokens: int, *, progress: Callable[[int, int], None] | None = None
    ) -> list[list[str]]:
        """What the model writes to each prompt in each trial, taking the most likely token each time.

        Args:
            trials: what is done; its positions are ``last``, ``each`` or ``generated``.
            new_tokens: tokens to write, at most.
            progress: called with the numbers of texts done and in all.

        Returns:
            For each trial the text for each prompt.

        Raises:
            InputError: a position is another one, or the model cannot write.
        """
        module: Any = self.model.module
        if not hasattr(module, "generate") or self.model.tokenizer is None:
            raise InputError(f"{self.model.name} cannot write: it has no generate(), or no tokenizer")
        if whole_number(new_tokens, "new_tokens") < 1:
            raise InputError(f"new_tokens is {new_tokens}; it must be at least 1")
        out = [[""] * len(self) for _ in trials]
        settings = _greedy(self.model, new_tokens)
        stops = set(_many(settings.eos_token_id))

        def generated(inputs: dict[str, Any], cache: Any) -> torch.Tensor:
            kept = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            past = {} if cache is None else {"past_key_values": cache}
            with _alone(module, settings):
                return module.generate(**kept, **past, generation_config=settings)

        done = 0
        for group, which, found in self._passes(trials, generated):
            begun = self.prompts[group.numbers[0]].ids
            # generate() puts the decoder's first token before what does not begin with it
            start = len(begun) + (self.model.encoder_decoder and int(found[0, 0]) != begun[0])
            for (t, n), ids in zip(which, found[:, start:].tolist(), strict=True):
                end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
                out[t][n] = self.model.tokenizer.decode(ids[:end], skip_special_tokens=True)
            done += len(which)
            if progress is not None:
                progress(done, len(trials) * len(self))
        return out

    def next_tokens(
        self, trials: Sequence[Trial], targets: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """What the model expects after each prompt in each trial.

        Args:
            trials: as for `write`.
            targets: for each prompt ids of tokens, of which the most likely one counts.

        Returns:
            The log-probability of the target, [trials, prompts] nats; and the id of the most likely token, likewise.

        Raises:
            InputError: a position is another one, a prompt has no target, or an id is not in the vocabulary.
        """
        wanted = [[whole_number(t, "target") for t in some] for some in targets]
        if len(wanted) != len(self) or not all(wanted):
            raise InputError(f"there are {len(self)} prompts and {len(wanted)} lists of targets: give ids for each")
        size = self.model.columns.size
        beyond = next((t for some in wanted for t in some if not 0 <= t < size), None)
        if beyond is not None:
            raise InputError(f"target id {beyond} is not in the vocabulary (0 to {size - 1})")
        logprob = np.full((len(trials), len(self)), np.nan)
        top = np.zeros((len(trials), len(self)), dtype=np.int64)

        def answered(inputs: dict[str, Any], cache: Any) -> torch.Tensor:
            if self.model.takes("logits_to_keep"):
                inputs["logits_to_keep"] = 1
            if cache is not None:
                inputs |= {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache, "use_cache": True}
            output = output_of(self.model.module(**inputs))
            if output is None:
                raise ModelError(f"{self.model.name} returned no logits")
            return output.logits[:, -1].double()

        for _, which, logits in self._passes(trials, answered):
            shares = logits.log_softmax(-1)
            for row, (t, n) in enumerate(which):
                logprob[t, n] = float(shares[row, wanted[n]].max())
                top[t, n] = int(logits[row].argmax())
        return logprob, top

    # -- one batch -----------------------------------------------------------------------------

    def _passes(self, trials: Sequence[Trial], run: Callable[[dict[str, Any], Any], torch.Tensor]) -> Any:
        """For each batch its group, the trial and prompt of each row, and what ``run`` gives."""
        given: list[Any] = list(trials)
        for trial in given:
            if not isinstance(trial, list | tuple) or not all(map(_late, cast("Sequence[Any]", trial))):
                raise InputError(
                    f"a trial is a list of interventions at positions {', '.join(LATE)}, of all sequences (no cut())"
                )
        for group in self._groups:
            size = max(1, self.rows // len(group.numbers))
            for first in range(0, len(trials), size):
                some = trials[first : first + size]
                yield group, *self._pass(group, first, some, run)

    def _pass(
        self, group: _Group, first: int, trials: Sequence[Trial], run: Callable[[dict[str, Any], Any], torch.Tensor]
    ) -> tuple[list[tuple[int, int]], torch.Tensor]:
        model, count = self.model, len(trials)
        given = [self.prompts[n] for n in group.numbers for _ in trials]
        cache = self._begun(group, count)
        changes = [
            item.only(range(t, len(given), count)) if count > 1 else item
            for t, trial in enumerate(trials)
            for item in trial
        ]
        inputs = arguments_of(model, given)
        with model.exclusive(), torch.no_grad(), QuickGradients(forward=True), ExitStack() as stack:
            if changes:
                stack.enter_context(intervene(model, changes))
            try:
                found = run(inputs, cache)
            except LogitlabError:
                raise
            except Exception as error:  # a model's own code can raise anything
                raise stopped(model, inputs, error) from error
        return [(first + t, n) for n in group.numbers for t in range(count)], found

    def _begun(self, group: _Group, times: int) -> Any:
        """A copy of the cache after all tokens but the last, for so many trials; None where there is none."""
        short = len(self.prompts[group.numbers[0]].ids) < 2 or len(self._longest.ids) < FEWEST
        if short or not continues(self.model, self._longest):  # a block around this one, say
            return None
        assert self.model.continuation is not None
        if group.state != self.model.continuation.state:
            group.state = self.model.continuation.state
            before = [Encoded(None, self.prompts[n].ids[:-1]) for n in group.numbers]
            handed: Any = cache_of(self.model, before)
            found = handed.get("past_key_values") if len(handed) == 1 else None
            group.cache = found if hasattr(found, "batch_repeat_interleave") else None
        if group.cache is None:
            return None
        copy = deepcopy(group.cache)
        if times > 1:
            copy.batch_repeat_interleave(times)
        return copy


def _late(item: Any) -> bool:
    """Whether something is an intervention that changes no token before the last one of a prompt."""
    return isinstance(item, Intervention) and item.positions in LATE and item.sequences is None


@contextmanager
def _alone(module: Any, settings: Any) -> Generator[None]:
    """Settings by themselves: where one says nothing, generate() asks the model's own, a repetition penalty say."""
    own = getattr(module, "generation_config", None)
    module.generation_config = settings
    try:
        yield
    finally:
        module.generation_config = own


def _many(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [] if value is None else [int(value)]


def _greedy(model: Model, new_tokens: int) -> Any:
    """Settings that take the most likely token each time, whatever the model's own are."""
    from transformers import GenerationConfig

    own: Any = getattr(model.module, "generation_config", None)
    config: Any = getattr(model.module, "config", None)
    names = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")
    special = {name: getattr(own, name, None) for name in names}
    special = {name: getattr(config, name, None) if value is None else value for name, value in special.items()}
    ends = _many(special["eos_token_id"])
    if special["pad_token_id"] is None:
        special["pad_token_id"] = ends[0] if ends else 0
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, num_beams=1, **special)
