"""Interventions at work: for the length of a ``with`` block, in the thread that has begun it, and nowhere else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from logitlab.errors import InputError, ModelError
from logitlab.interventions.attention import Cut, Cutter
from logitlab.interventions.changes import Change, Rows
from logitlab.interventions.intervention import Intervention
from logitlab.interventions.positions import Tokens, chosen
from logitlab.models.decompose import Projection
from logitlab.models.handle import Model
from logitlab.models.hooks import Taps, wrapped
from logitlab.models.interfere import active, interfering
from logitlab.models.template import forward_parameters
from logitlab.models.watch import Key, projection_of, watch


@contextmanager
def intervene(model: Model, *interventions: Intervention | Cut | Iterable[Intervention | Cut]) -> Generator[None]:
    """Change what happens at some sites of a model for the length of a ``with`` block.

    What runs in the block is changed: `logitlab.read`, `logitlab.capture`, `logitlab.generate`, Transformers' own
    ``generate``, and calls of the module. Interventions work in the order in which they are given, those of outer
    blocks first; states are read as they are then. Other threads see the model as it is.

    Args:
        model: the model.
        interventions: from `add`, `replace`, `scale`, `project_out`, `ablate`, `resample`, `swap`, `clamp` and `cut`.

    Raises:
        InputError: a site does not exist or was not verified on this model, or something is of another width. In the
            block: a position is beyond a prompt.

    Example:
        ``with intervene(model, add("8.resid_post", vector, positions="last")): reading = read(model, "a b c")``
    """
    given: list[Any] = []
    for item in interventions:
        given += list(item) if isinstance(item, Iterable) else [item]
    strange = next((i for i in given if not isinstance(i, Intervention | Cut)), None)
    if strange is not None:
        raise InputError(f"a {type(strange).__name__} is no intervention: use add(), replace(), ablate(), cut(), ...")
    if not given:
        raise InputError("no intervention is given")
    work = _Work(model, given)
    with ExitStack() as stack:
        stack.enter_context(interfering(model.module, work, [i.describe() for i in given]))
        work.attach(stack)
        yield


class Steering:
    """Interventions that are put on and taken off by hand, where a ``with`` block does not fit.

    Args:
        model: the model.
        interventions: as for `intervene`.

    Example:
        ``handle = Steering(model, add("8.resid_post", vector)); ...; handle.remove()``
    """

    def __init__(self, model: Model, *interventions: Intervention | Cut) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(intervene(model, *interventions))

    def remove(self) -> None:
        """Take them off; a second time does nothing."""
        self._stack.close()

    def __enter__(self) -> Steering:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


_RUN: ContextVar[_Run | None] = ContextVar("logitlab generation", default=None)


class _Run:
    """One generation.

    Attributes:
        mask: [batch, tokens] of its prompts, as the call says or as its first pass has seen them.
    """

    def __init__(self, mask: torch.Tensor | None) -> None:
        self.mask = mask
        self.seen: dict[int, int] = defaultdict(int)  # by who counts: blocks in blocks count each for itself


class _Work:
    """What one ``with`` block does."""

    def __init__(self, model: Model, given: Iterable[Intervention | Cut]) -> None:
        self.model = model
        self.changes: dict[Key, list[tuple[int | None, Change, Intervention]]] = defaultdict(list)
        cuts: list[Cut] = []
        for item in given:
            if isinstance(item, Cut):
                cuts.append(item)
                continue
            for site, change in item.at(model):
                self.changes[site.layer, site.kind].append((site.index, change, item))
        self.cutter = Cutter(model, cuts, self._tokens, lambda: self._active) if cuts else None
        for work in active(model.module):
            twice = [key for key in self.changes if key[1] in ("head_out", "neuron") and key in work.changes]
            if twice:
                raise InputError(
                    f"{twice[0][1]} of layer {twice[0][0]} is changed by another block around this one already: put "
                    "both into one intervene()"
                )
        self.on = True
        self._tokens_now: Tokens | None = None
        self._inputs: dict[str, Any] = {}
        self._past: int | None = None
        self._matrices: dict[tuple[Key, int], torch.Tensor] = {}
        if any(kind not in ("resid_pre", "resid_post") for _, kind in self.changes) or cuts:
            _ = model.parts  # taking blocks apart runs the model: not while it is changed

    def attach(self, stack: ExitStack) -> None:
        """Put the hooks on."""
        taps = stack.enter_context(Taps())
        taps.before(self.model.module, self._begin)
        watch(self.model, list(self.changes), self._edit, taps, edit=True)
        if self.cutter is not None:
            self.cutter.attach(taps)
        _wrap_generate(self.model.module, stack)

    # -- one pass ------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._active:
            return
        names = [name for name in forward_parameters(module) if name != "self"] if args else []
        self._inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        self._past = _length(self._inputs)  # now: the first layer lengthens the cache
        self._tokens_now = None

    @property
    def _active(self) -> bool:
        return self in active(self.model.module)

    def _tokens(self, batch: int, count: int, device: torch.device) -> Tokens:
        """What is known of the tokens of this pass."""
        if self._tokens_now is None:
            self._tokens_now = self._look(batch, count)
        number = self._tokens_now.number
        if number.shape != (batch, count):
            raise ModelError(
                f"the states of {self.model.stack.name} have {count} positions of {batch} sequences, and its tokens "
                f"{list(number.shape)}: where a token is cannot be told"
            )
        return self._tokens_now.to(device)

    def _look(self, batch: int, count: int) -> Tokens:
        name = "decoder_attention_mask" if self.model.encoder_decoder else "attention_mask"
        mask = self._inputs.get(name)
        plain = isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[0] == batch
        run, past = _RUN.get(), self._past
        if past is None:
            wide = mask.shape[1] if plain and isinstance(mask, torch.Tensor) else 0
            seen = 0 if run is None else run.seen[id(self)]
            past = wide - count if wide > count else seen if count <= seen else 0
        whole = mask.cpu() if plain and isinstance(mask, torch.Tensor) and mask.shape[1] == past + count else None
        if whole is None:
            whole = torch.ones(batch, past + count, dtype=torch.long)
            known = None if run is None else _rows(run.mask, batch)
            if known is not None:  # some caches are given masks of another form
                width = min(known.shape[1], whole.shape[1])
                whole[:, :width] = known[:, :width]
        if run is None:
            return Tokens.of(whole, count, None)
        if run.mask is None:
            run.mask = whole
        run.seen[id(self)] = past + count
        prompt = _rows(run.mask, batch)
        if prompt is None:
            raise ModelError(f"{batch} sequences are written to {len(run.mask)} prompts: whose they are cannot be told")
        return Tokens.of(whole, count, prompt.bool().sum(1))

    def _edit(
        self, key: Key, value: torch.Tensor, scale: float = 1.0, given: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The state at a site as it is to be; None where nothing is to be done."""
        if not self._active:
            return None
        if not self._inputs:
            raise ModelError(
                f"a part of {self.model.name} was called by itself: interventions need calls of the whole model, which "
                "tell them what its tokens are"
            )
        layout = self.model.stack.layout
        resid = key[1] in ("resid_pre", "resid_post")
        batch = layout.batch_size(value.shape) if resid and layout.batch is not None else self._batch(value)
        rows = layout.rows(value) if resid else value.reshape(-1, value.shape[-1])
        count = len(rows) // batch
        tokens = self._tokens(batch, count, rows.device)
        rows = rows.clone()
        now: dict[int, torch.Tensor] = {}  # what heads and neurons that have been changed already write
        for index, change, item in self.changes[key]:
            slots = self._slots(item, tokens).reshape(-1)
            (which,) = (slots >= 0).nonzero(as_tuple=True)
            if not len(which):
                continue
            where = Rows(which // count, tokens.number.reshape(-1)[which], slots[which])
            if index is None:
                rows[which] = _divided(change(_times(rows[which], scale), where), scale)
            else:
                if index not in now:
                    now[index] = self._own(key, index, given)
                own = now[index][which]
                moved = change(own.to(rows.dtype), where).to(own.dtype) - own
                now[index][which] = own + moved
                part = projection_of(self.model, key)
                assert part is not None
                rows[which] += _divided(moved, part.scale).to(rows.dtype)
        return layout.state(rows, value.shape) if resid else rows.reshape(value.shape)

    @staticmethod
    def _slots(item: Intervention, tokens: Tokens) -> torch.Tensor:
        """`chosen`, in the sequences that an intervention names."""
        if item.sequences is None:
            return chosen(item.positions, tokens)
        batch, some = len(tokens.number), list(item.sequences)
        if max(some) >= batch:
            raise InputError(
                f"sequence {max(some)} is beyond the batch, which has {batch}: only() is for batches that a module or "
                "generate() is called with"
            )
        slots = torch.full_like(tokens.number, -1)
        slots[some] = chosen(item.positions, Tokens(tokens.number[some], tokens.prompt[some], tokens.every[some]))
        return slots

    def _batch(self, value: torch.Tensor) -> int:
        """How many sequences there are."""
        for name in ("decoder_input_ids", "input_ids", "inputs_embeds", "attention_mask"):
            given = self._inputs.get(name)
            if isinstance(given, torch.Tensor) and given.ndim >= 2:
                return given.shape[0]
        return self.model.stack.layout.batch_size(value.shape)

    def _own(self, key: Key, index: int, given: torch.Tensor | None) -> torch.Tensor:
        """What a head or neuron writes, [tokens, width] float32."""
        part = projection_of(self.model, key)
        assert part is not None
        assert given is not None
        size = given.shape[-1] // part.parts
        pieces = given.reshape(-1, part.parts, size)[:, index].float()
        return pieces @ self._matrix(key, part, index, size).to(pieces.device)

    def _matrix(self, key: Key, part: Projection, index: int, size: int) -> torch.Tensor:
        if (key, index) not in self._matrices:
            self._matrices[key, index] = part.matrix()[index * size : (index + 1) * size].clone()
        return self._matrices[key, index]


def _times(rows: torch.Tensor, scale: float) -> torch.Tensor:
    return rows if scale == 1.0 else rows * scale


def _divided(rows: torch.Tensor, scale: float) -> torch.Tensor:
    return rows if scale == 1.0 else rows / scale


def _length(inputs: dict[str, Any]) -> int | None:
    """How many tokens a cache stands for; None where that is not known."""
    cache = inputs.get("past_key_values")
    if cache is None:
        return None
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return None


def _rows(mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """A mask of prompts for ``batch`` sequences, several of which can be of one prompt (beams)."""
    if mask is None or batch % len(mask):
        return None
    return mask.repeat_interleave(batch // len(mask), 0)


def _wrap_generate(module: nn.Module, stack: ExitStack) -> None:
    """Let calls of ``generate`` know that their passes belong together, and what their prompts are."""
    if not hasattr(module, "generate"):
        return

    def generate(real: Any, *args: Any, **kwargs: Any) -> Any:
        outer = _RUN.get()
        token = _RUN.set(_Run(_prompts(module, args, kwargs)) if outer is None else outer)
        try:
            return real(*args, **kwargs)
        finally:
            _RUN.reset(token)

    stack.callback(wrapped(module, "generate", generate))


def _prompts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The mask of the prompts of a call of ``generate``, [batch, tokens]; None where its first pass has to tell."""
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return None
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return mask.cpu().long()
    given = [*(kwargs.get(name) for name in ("input_ids", "inputs")), *args[:1]]
    ids = next((value for value in given if value is not None), None)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return None
    pad: Any = kwargs.get("pad_token_id", getattr(getattr(module, "generation_config", None), "pad_token_id", None))
    if isinstance(pad, int) and bool((ids == pad).any()):
        return None  # Transformers takes that for padding, or not, by rules of its own
    return torch.ones(ids.shape, dtype=torch.long)
