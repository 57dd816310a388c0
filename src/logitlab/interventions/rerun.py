"""Many changed passes over one prompt, of which blocks that nothing has changed yet do not run again.

One pass is recorded. Later ones have copies of the prompt as the rows of a batch, each row changed in its own way. What
is before the first changed block answers from the record, where that was shown to give the same; and only the last
position is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch

from logitlab.errors import LogitlabError, ModelError
from logitlab.interventions.apply import intervene
from logitlab.interventions.attention import Cut
from logitlab.interventions.intervention import Intervention
from logitlab.interventions.metric import Measure
from logitlab.models.handle import Model
from logitlab.models.hooks import StopForward, Taps, hidden_input
from logitlab.models.inputs import Encoded
from logitlab.models.output import output_of
from logitlab.models.passes import arguments_of, stopped
from logitlab.models.trace import copied, rebuilt
from logitlab.models.watch import Key, watch

Edit = Callable[[torch.Tensor, float, torch.Tensor | None], None]
"""Changes states [rows, tokens, width] in place. It is also given the factor by which they are in units of the residual
stream; and at heads and neurons what their projection was given, [rows, tokens, inputs]. It may raise `StopForward`."""


class Rerun:
    """A recorded pass over a prompt, and changed ones.

    Args:
        model: the model.
        prompt: the prompt.
        measure: what is measured.
        rows: most rows of a pass.
        noise: interventions that are there in every pass.
        recording: puts further hooks on the recorded pass.

    Attributes:
        value: what is measured without any change.
        rows: most rows of a pass: pictures and sounds are not repeated for each row.
    """

    def __init__(
        self,
        model: Model,
        prompt: Encoded,
        measure: Measure,
        rows: int,
        noise: Sequence[Intervention | Cut] = (),
        recording: Callable[[Taps], None] | None = None,
    ) -> None:
        self.model, self.prompt, self.measure, self.noise = model, prompt, measure, noise
        self.rows = 1 if prompt.extra else rows
        self._outputs: list[Any] = []
        self._short = False

        def record(taps: Taps) -> None:
            if self._can_answer:
                for block in model.stack.blocks:
                    taps.after(block.module, self._note)
            if recording is not None:
                recording(taps)

        self.value = self._measured(1, record)[0]
        self._short = self._can_answer
        self._short = self._short and self._proved(self.value)

    def values(self, count: int, first: int, edits: Mapping[Key, Edit]) -> list[float]:
        """What is measured in each row of a changed pass.

        Args:
            count: number of rows, each a copy of the prompt.
            first: the first block that has to run: nothing before it is changed but the state that it is given.
            edits: by layer and kind of the site, what is done there.
        """
        return self._measured(count, lambda taps: self._attach(taps, count, first, edits))

    def run(self, count: int, first: int, edits: Mapping[Key, Edit]) -> None:
        """A pass of which nothing is measured: an edit looks at what it wants, and may stop the pass."""
        with ExitStack() as stack:
            if self.noise:
                stack.enter_context(intervene(self.model, self.noise))
            last_rows(self.model, [self.prompt] * count, lambda taps: self._attach(taps, count, first, edits))

    def _measured(self, count: int, hooks: Callable[[Taps], None]) -> list[float]:
        with ExitStack() as stack:
            if self.noise:
                stack.enter_context(intervene(self.model, self.noise))
            return measured(self.model, [self.prompt] * count, self.measure, hooks)

    def _note(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self._outputs.append(copied(output))

    @property
    def _can_answer(self) -> bool:
        """Whether blocks can answer from the record: each module is one of them, states are [batch, tokens, width]."""
        stack = self.model.stack
        return len({id(b.module) for b in stack.blocks}) == len(stack) and stack.layout.order == (0, 1, 2)

    def _proved(self, expected: float) -> bool:
        """Whether a pass whose first half answers from the record ends as the whole one: blocks may share more."""
        rows, blocks = min(2, self.rows), len(self.model.stack)
        found: list[float] = []
        try:
            for first in {(blocks + 1) // 2, blocks - 1, blocks}:
                found += self.values(rows, first, {})
        except LogitlabError:
            return False
        return all(abs(value - expected) <= 1e-3 * (1 + abs(expected)) for value in found)

    def _attach(self, taps: Taps, count: int, first: int, edits: Mapping[Key, Edit]) -> None:
        """Hooks of a changed pass; blocks before ``first`` do not run."""
        given = {key for key in edits if key[1] == "resid_post" and key[0] < first} if self._short else set[Key]()
        if self._short:
            for layer in range(min(first, len(self.model.stack))):
                edit = edits[layer, "resid_post"] if (layer, "resid_post") in given else None
                taps.replace(self.model.stack.blocks[layer].module, self._answer(layer, count, edit))

        def change(key: Key, value: torch.Tensor, scale: float = 1.0, inner: torch.Tensor | None = None) -> Any:
            layout = self.model.stack.layout
            resid = key[1] in ("resid_pre", "resid_post")
            rows = layout.rows(value) if resid else value.reshape(-1, value.shape[-1])
            rows = rows.clone(memory_format=torch.contiguous_format)
            states = rows.reshape(count, -1, rows.shape[-1])
            inputs = None if inner is None else inner.reshape(count, states.shape[1], -1)
            edits[key](states, scale, inputs)
            return layout.state(rows, value.shape) if resid else rows.reshape(value.shape)

        watch(self.model, [key for key in edits if key not in given], change, taps, edit=True)

    def _answer(self, layer: int, count: int, edit: Edit | None) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            def many(value: Any) -> Any:
                if isinstance(value, torch.Tensor):
                    return value.expand(count, *value.shape[1:]).clone() if value.shape[:1] == (1,) else value
                return rebuilt(value, many)

            output = many(self._outputs[layer])
            if edit is not None:
                edit(output if isinstance(output, torch.Tensor) else next(_tensors(output)), 1.0, None)
            return output

        return answer


def measured(
    model: Model, prompts: Sequence[Encoded], measure: Measure, hooks: Callable[[Taps], None] | None = None
) -> list[float]:
    """What is measured of every prompt of one pass; all have as many tokens.

    Raises:
        InputError: the model does not run on them.
        ModelError: it gives no logits.
    """
    rows = last_rows(model, prompts, hooks)
    if rows is None:
        raise ModelError(f"{model.name} came to no end in a pass that was to be measured")
    return measure.of(model, rows, logits=model.tail.head_module is None)


def last_rows(
    model: Model, prompts: Sequence[Encoded], hooks: Callable[[Taps], None] | None = None
) -> torch.Tensor | None:
    """What the head is given at the last position of every prompt of one pass, [prompts, d].

    Where there is no module that is the head, the logits [prompts, V]; None where a hook has stopped the pass.

    Raises:
        InputError: the model does not run on them.
        ModelError: it gives no logits.
    """
    head = model.tail.head_module
    seen: list[torch.Tensor] = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        given = hidden_input(args, kwargs)
        if given is not None:
            seen.append(given)
        raise StopForward

    with model.exclusive(), Taps() as taps:
        if hooks is not None:
            hooks(taps)
        if head is not None:
            taps.replace(head, stop)
        inputs = arguments_of(model, prompts)
        if model.takes("use_cache"):
            inputs["use_cache"] = False
        result: Any = None
        ended = False
        try:
            with suppress(StopForward), torch.no_grad():
                result = model.module(**inputs)
                ended = True
        except LogitlabError:
            raise
        except Exception as error:  # a model's own code can raise anything
            raise stopped(model, inputs, error) from error
    if head is None and ended:
        output = output_of(result)
        if output is None:
            raise ModelError(f"{model.name} returned no logits")
        seen.append(output.logits)
    return seen[-1].reshape(len(prompts), len(prompts[0].ids), -1)[:, -1].detach() if seen else None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    items: Any = value.values() if hasattr(value, "values") else value
    for item in items:
        if isinstance(item, torch.Tensor) and item.is_floating_point():
            yield item
