"""Patchscopes: put a hidden state into another prompt and see what the model makes of it there.

A state of a site goes into layer m, position q of a target prompt, in place of what is there, and what leaves the last
block at q is decoded (Ghandeharioun et al. 2024, arXiv 2401.06102). The logit lens is the case that m is the
last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import nn

from logitlab.errors import InputError, ModelError
from logitlab.lenses.base import Lens
from logitlab.models.capture import by_tokens
from logitlab.models.handle import Model
from logitlab.models.hooks import FORWARD_ERRORS, StopForward, Taps, first_tensor, hidden_input, with_hidden
from logitlab.models.inputs import Encoded, whole_number
from logitlab.models.passes import arguments_of, stopped
from logitlab.models.sites import Site

IDENTITY_PROMPT = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"
"""A prompt that asks a model to say again what is at its last token (arXiv 2401.06102, section 4.1)."""


class PatchscopeLens:
    """A lens that runs the model on a target prompt for every hidden state.

    Each state costs a pass over the target prompt from layer ``m`` on (the layers before it are run too), so it suits
    some positions of a few prompts rather than a corpus.

    Args:
        model: the model; states of others cannot be read.
        prompt: the target prompt: a text, or token ids; by default one that asks for the token at its end.
        layer: m, the block whose output is replaced; None for the layer that the state comes from.
        position: q, the position that is replaced and read; negative numbers count from the end.
        lens: a lens that maps the state before it is put in, for instance a fitted one.
        batch: states of one pass.

    Raises:
        InputError: the prompt, layer or position cannot be used, or the model is not read token by token from
            text alone.

    Example:
        ``read(model, "The Eiffel Tower is in", positions=-1, lens=PatchscopeLens(model))``
    """

    def __init__(
        self,
        model: Model,
        prompt: str | Sequence[int] = IDENTITY_PROMPT,
        *,
        layer: int | None = None,
        position: int = -1,
        lens: Lens | None = None,
        batch: int = 32,
    ) -> None:
        (self.target,) = model.encode([prompt] if isinstance(prompt, str) else [list(prompt)])
        if model.encoder_decoder or self.target.extra or not by_tokens(model, [self.target]):
            raise InputError(f"{model.name} is not read token by token from text alone: a patchscope needs that")
        length, n_layers = len(self.target.ids), model.n_layers
        position = whole_number(position, "position")
        if not -length <= position < length:
            raise InputError(f"position {position} is not in the target prompt, which has {length} tokens")
        if layer is not None and not -n_layers <= whole_number(layer, "layer") < n_layers:
            raise InputError(f"layer {layer} does not exist: {model.name} has {n_layers} (0 to {n_layers - 1})")
        if whole_number(batch, "batch") < 1:
            raise InputError(f"batch is {batch}; it must be at least 1")
        self.model, self.lens, self.batch = model, lens, batch
        self.layer = None if layer is None else layer % n_layers
        self.position = position % length

    @property
    def name(self) -> str:
        """What the lens is called in readings."""
        return "patchscope"

    def check(self, model: Model, sites: list[Site]) -> None:
        """Raise `InputError` if the lens belongs to another model, or a site is not of the residual stream."""
        if model.module is not self.model.module or model.stack.name != self.model.stack.name:
            raise InputError(f"this patchscope runs {self.model.name}; make one for {model.name}")
        strange = next((site for site in sites if site.kind not in ("resid_pre", "resid_post")), None)
        if strange is not None:
            raise InputError(
                f"{strange} is no state of the residual stream: a patchscope puts those into another prompt"
            )
        if self.lens is not None:
            self.lens.check(model, sites)

    def transport(self, hidden: torch.Tensor, site: Site) -> torch.Tensor:
        """What leaves the last block at the patched position, [..., width], for states [..., width] of one site."""
        if hidden.shape[-1] != self.model.width:
            raise InputError(
                f"the states have width {hidden.shape[-1]}; those of {self.model.name} have {self.model.width}"
            )
        if self.lens is not None:
            hidden = self.lens.transport(hidden, site)
        into = site if self.layer is None else Site(self.layer, "resid_post")
        if into == self.model.last_site:
            return hidden
        flat = hidden.reshape(-1, hidden.shape[-1])
        found = [self._run(some, into) for some in flat.split(self.batch)]
        return torch.cat(found).reshape(hidden.shape).to(hidden.dtype) if found else hidden

    def describe(self) -> dict[str, Any]:
        """Plain values for the provenance of a reading."""
        prompt = self.target.text if self.target.text is not None else list(self.target.ids)
        found = {"name": self.name, "prompt": prompt, "layer": self.layer, "position": self.position}
        return found | ({} if self.lens is None else {"behind": self.lens.describe()})

    def _run(self, rows: torch.Tensor, into: Site) -> torch.Tensor:
        """One pass over as many copies of the target prompt as there are rows [n, width]."""
        model, layout = self.model, self.model.stack.layout
        final: list[torch.Tensor] = []

        def patched(state: torch.Tensor) -> torch.Tensor:
            found = layout.rows(state).clone().reshape(len(rows), -1, rows.shape[-1])
            if found.shape[1] != len(self.target.ids):
                raise ModelError(f"{model.stack.name} has {found.shape[1]} positions for {len(self.target.ids)} tokens")
            found[:, self.position] = rows.to(device=found.device, dtype=found.dtype)
            return layout.state(found.flatten(0, 1), state.shape)

        def keep(state: torch.Tensor) -> None:
            found = layout.rows(state).reshape(len(rows), -1, rows.shape[-1])
            final.append(found[:, self.position].detach().clone())
            raise StopForward

        prompts = [Encoded(None, self.target.ids)] * len(rows)
        with model.exclusive(), Taps() as taps:
            _edit(model, into, patched, taps)
            _after(model, model.n_layers - 1, keep, taps)
            inputs = arguments_of(model, prompts)
            try:
                with torch.no_grad():
                    model.module(**inputs)
            except StopForward:
                pass
            except FORWARD_ERRORS as error:
                raise stopped(model, inputs, error) from error
        if not final:
            raise ModelError(f"the last block of {model.stack.name} was not reached on the target prompt")
        return final[-1]


def _edit(model: Model, site: Site, patched: Any, taps: Taps) -> None:
    """Have the state at a whole site replaced by what ``patched`` makes of it."""
    block = model.stack.blocks[site.layer]
    calls = count()
    if site.kind == "resid_pre":

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if next(calls) != block.call:
                return None
            state = hidden_input(args, kwargs)
            assert state is not None
            new = patched(state)
            return (
                tuple(new if a is state else a for a in args),
                {k: new if v is state else v for k, v in kwargs.items()},
            )

        taps.before(block.module, enter)
        return

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if next(calls) != block.call:
            return None
        state = first_tensor(output)
        assert state is not None
        return with_hidden(output, patched(state))

    taps.after(block.module, leave)


def _after(model: Model, layer: int, keep: Any, taps: Taps) -> None:
    block = model.stack.blocks[layer]
    calls = count()

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if next(calls) == block.call:
            keep(first_tensor(output))

    taps.after(block.module, leave)
