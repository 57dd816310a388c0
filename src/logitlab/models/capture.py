"""Run a model and keep what it left at chosen sites and positions, nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import torch
from torch import nn

from logitlab.errors import InputError, LogitlabError, ModelError
from logitlab.models.decompose import Projection
from logitlab.models.handle import Model
from logitlab.models.hooks import StopForward, Taps, first_tensor, hidden_input
from logitlab.models.inputs import Encoded, whole_number
from logitlab.models.output import output_of
from logitlab.models.sites import Site
from logitlab.models.trace import Run, Trace, copied


@dataclass(frozen=True)
class Activations:
    """What a forward pass left at some sites.

    Attributes:
        sites: the sites, in order of depth.
        prompts: the prompts.
        positions: by prompt, the positions that were kept.
        kept: what was captured: for whole sites the hidden states [rows, width], for heads and
            neurons the inputs of their projection [rows, inputs]; rows are all kept positions of
            all prompts, one prompt after the other.
        projections: by (layer, kind), the map that turns those inputs into heads or neurons.
        answers: what the model itself went on with at the last kept position of each prompt, to hold the
            tail against: the head's input where the pass stopped there, else the logits.
    """

    sites: tuple[Site, ...]
    prompts: tuple[Encoded, ...]
    positions: tuple[tuple[int, ...], ...]
    kept: dict[tuple[int, str], torch.Tensor]
    projections: dict[tuple[int, str], Projection]
    answers: torch.Tensor | None = None

    def __getitem__(self, site: str | Site) -> torch.Tensor:
        """Hidden states [rows, width] of one site, in the dtype of the model (heads, neurons: float32).

        Raises:
            InputError: the site was not captured.
        """
        found = next((s for s in self.sites if str(s) == str(site)), None)
        if found is None:
            raise InputError(f"site {site} was not captured; there are {', '.join(map(str, self.sites[:8]))} ...")
        return self.stacked([found])[0]

    def stacked(self, sites: Sequence[Site]) -> torch.Tensor:
        """Hidden states of several sites, [sites, rows, width]."""
        parts: list[torch.Tensor] = []
        i = 0
        while i < len(sites):
            key = (sites[i].layer, sites[i].kind)
            if sites[i].index is None:
                parts.append(self.kept[key].unsqueeze(0))
                i += 1
                continue
            j = i
            while j < len(sites) and (sites[j].layer, sites[j].kind) == key:
                j += 1
            indices = [cast(int, site.index) for site in sites[i:j]]
            parts.append(self.projections[key].expand(self.kept[key], indices).transpose(0, 1))
            i = j
        device = parts[0].device
        dtype = parts[0].dtype if all(p.dtype == parts[0].dtype for p in parts) else torch.float32
        return torch.cat([p.to(device=device, dtype=dtype) for p in parts])

    def rows_of(self, prompt: int) -> slice:
        """The rows that belong to one prompt."""
        start = sum(len(p) for p in self.positions[:prompt])
        return slice(start, start + len(self.positions[prompt]))


def capture(
    model: Model,
    inputs: Any,
    sites: str | Site | Iterable[str | Site] | None = None,
    positions: int | slice | Sequence[int] | None = None,
    *,
    decoder: Any = None,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Activations:
    """Run a model and keep the hidden states at some sites and positions.

    Args:
        model: a handle from `logitlab.load` or `logitlab.wrap`.
        inputs: prompts in any form that `logitlab.read` takes.
        sites: which sites, see `logitlab.models.sites`; by default the residual stream.
        positions: which tokens of each prompt: a number (negative counts from its own end), a slice,
            several numbers, or None for all.
        decoder: what the decoder of an encoder-decoder model has already written.
        batch_tokens: put several prompts, padded on the right and masked, into one forward pass of
            at most this many tokens: quicker for many short prompts, but every block then rounds
            differently (``benchmarks/batching.py`` measures by how much). By default each prompt has
            a pass of its own, so its values do not depend on its neighbours.
        progress: called with the numbers of prompts done and in all.

    Returns:
        The activations. No hook is left on the model, also after an exception.

    Raises:
        InputError: a site or position does not exist, or an input cannot be used.

    Example:
        ``capture(model, "a b c", "3.mlp_out", positions=-1)["3.mlp_out"]`` has shape [1, width].
    """
    prompts = model.encode(inputs, decoder=decoder)
    _need_tokens(model, prompts)
    chosen = model.select_sites(sites)
    kept_positions = [select_positions(positions, len(p.ids), n) for n, p in enumerate(prompts)]
    return capture_encoded(model, prompts, chosen, kept_positions, batch_tokens, progress)


def capture_encoded(
    model: Model,
    prompts: Sequence[Encoded],
    sites: Sequence[Site],
    positions: Sequence[Sequence[int]],
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Activations:
    """`capture` for inputs that are already encoded and checked."""
    keys = list(dict.fromkeys((site.layer, site.kind) for site in sites))
    if any(kind not in ("resid_pre", "resid_post") for _, kind in keys):
        _ = model.parts  # taking blocks apart runs the model: not while it is watched
    pieces: dict[tuple[int, str], list[torch.Tensor]] = {key: [torch.empty(0)] * len(prompts) for key in keys}
    answers: list[torch.Tensor | None] = [None] * len(prompts)
    done = 0
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    most = (batch_tokens or 1) if model.stack.batch_first else 1
    for batch in _batches(prompts, most, padded=model.takes("attention_mask")):
        chosen = [positions[n] for n in batch]
        found, given = _forward(model, [prompts[n] for n in batch], keys, chosen)
        for i, n in enumerate(batch):
            answers[n] = None if given is None else given[i]
        for key, rows in found.items():
            for n, part in zip(batch, rows.split([len(p) for p in chosen]), strict=True):
                pieces[key][n] = part
        done += len(batch)
        if progress is not None:
            progress(done, len(prompts))
    return Activations(
        tuple(sites),
        tuple(prompts),
        tuple(tuple(p) for p in positions),
        {key: torch.cat(parts) for key, parts in pieces.items()},
        {key: p for key in keys if (p := _projection(model, key)) is not None},
        torch.stack([a for a in answers if a is not None]) if all(a is not None for a in answers) else None,
    )


def select_positions(positions: int | slice | Sequence[int] | None, length: int, prompt: int = 0) -> list[int]:
    """The positions of a prompt of ``length`` tokens that a request names.

    Raises:
        InputError: a position is outside the prompt, or nothing is selected.
    """
    if positions is None:
        return list(range(length))
    if isinstance(positions, slice):
        if positions.step == 0:
            raise InputError("the step of a slice of positions is 0; it must be another whole number")
        chosen = list(range(length))[positions]
    else:
        one: Any = positions
        many = list(one) if getattr(one, "ndim", 1) == 1 and not isinstance(one, int) else [one]
        wanted = [whole_number(p, "position") for p in many]
        for p in wanted:
            if not -length <= p < length:
                raise InputError(
                    f"position {p} is out of range: prompt {prompt} has {length} tokens "
                    f"(0 to {length - 1}, or -1 to -{length})"
                )
        chosen = list(dict.fromkeys(p % length for p in wanted))
    if not chosen:
        raise InputError(f"no position is selected in prompt {prompt}, which has {length} tokens (0 to {length - 1})")
    return chosen


def _batches(prompts: Sequence[Encoded], most: int, *, padded: bool) -> Iterator[list[int]]:
    """Group prompts of similar length so that a batch holds at most ``most`` tokens with padding."""
    order = sorted(range(len(prompts)), key=lambda n: _size(prompts[n]))
    batch: list[int] = []
    for n in order:
        size = _size(prompts[n])
        full = bool(batch) and (len(batch) + 1) * size[0] > most
        other = bool(batch) and not padded and size != _size(prompts[batch[0]])
        alone = bool(batch) and bool(prompts[n].extra or prompts[batch[0]].extra)
        if full or other or alone:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def _size(prompt: Encoded) -> tuple[int, int]:
    return max(len(prompt.ids), len(prompt.encoder_ids or ())), len(prompt.ids)


def arguments_of(model: Model, prompts: Sequence[Encoded]) -> dict[str, Any]:
    """Keyword arguments of the forward pass; padding is always on the right.

    With padding on the right every token keeps its own position number, whatever the tokenizer's
    habit, and nothing that comes before it changes.
    """
    arguments: dict[str, Any] = dict(model.template.options)
    for key, value in prompts[0].extra.items():  # a prompt with extras is a batch of its own
        kept = isinstance(value, torch.Tensor)
        cast_to = model.dtype if kept and value.is_floating_point() else None
        arguments[key] = value.to(device=model.device, dtype=cast_to) if kept else value
    if not any(p.ids for p in prompts):
        return arguments
    pad = getattr(model.tokenizer, "pad_token_id", None)
    if pad is None:
        pad = getattr(getattr(model.module, "config", None), "pad_token_id", None)
    fill = pad if isinstance(pad, int) and 0 <= pad < model.input_vocab_size else 0
    ids, mask = _padded([p.ids for p in prompts], fill, model.device)
    if model.encoder_decoder:
        arguments["decoder_input_ids"] = ids
        if model.takes("decoder_attention_mask"):
            arguments["decoder_attention_mask"] = mask
        if all(p.encoder_ids is not None for p in prompts):
            encoder_ids, encoder_mask = _padded([p.encoder_ids or () for p in prompts], fill, model.device)
            arguments["input_ids"] = encoder_ids
            if model.takes("attention_mask"):
                arguments["attention_mask"] = encoder_mask
        return arguments
    arguments["input_ids"] = ids
    if model.takes("attention_mask"):
        arguments["attention_mask"] = mask
    return arguments


def _padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def _projection(model: Model, key: tuple[int, str]) -> Projection | None:
    layer, kind = key
    if kind not in ("head_out", "neuron"):
        return None
    return {"head_out": model.parts[layer].heads, "neuron": model.parts[layer].neurons}.get(kind)


def _forward(
    model: Model,
    prompts: Sequence[Encoded],
    keys: Sequence[tuple[int, str]],
    positions: Sequence[Sequence[int]],
) -> tuple[dict[tuple[int, str], torch.Tensor], torch.Tensor | None]:
    """One forward pass; the wanted rows of every key, [rows, size]. Stops before the head if it can.

    The second result is what the model went on with at the last wanted position of each prompt,
    [prompts, size], or None where that has another form.
    """
    batch_index = torch.tensor([b for b, p in enumerate(positions) for _ in p])
    token_index = torch.tensor([t for p in positions for t in p])
    found: dict[tuple[int, str], torch.Tensor] = {}
    width = max(len(p.ids) for p in prompts)
    layout = model.stack.layout

    def keep(key: tuple[int, str], value: torch.Tensor, scale: float = 1.0) -> None:
        if key[1] in ("resid_pre", "resid_post") and value.ndim == 4:  # several residual streams
            value = layout.rows(value)
            shaped = value.reshape(len(prompts), -1, value.shape[-1])
        else:
            shaped = value.reshape(len(prompts), -1, value.shape[-1])  # some MLPs see [tokens, width]
        if shaped.shape[1] != width:
            raise ModelError(
                f"the states of {model.stack.name} have {shaped.shape[1]} positions for {width} tokens: "
                "this model puts in others that cannot be told apart from them"
            )
        rows = shaped[batch_index.to(value.device), token_index.to(value.device)].detach()
        found[key] = rows if scale == 1.0 else rows * scale

    with model.exclusive(), Taps() as taps:
        _attach(model, keys, keep, taps)
        went_on: list[torch.Tensor | None] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            went_on.append(hidden_input(args, kwargs))
            raise StopForward

        if model.tail.head_module is not None:
            taps.replace(model.tail.head_module, stop)
        inputs = arguments_of(model, prompts)
        try:
            with suppress(StopForward), torch.no_grad():
                output = output_of(model.module(**inputs))
                went_on.append(None if output is None else output.logits)
        except LogitlabError:
            raise
        except Exception as error:  # a model's own code can raise anything
            raise _stopped(model, inputs, error) from error
    missing = [key for key in keys if key not in found]
    if missing:
        raise ModelError(f"layer {missing[0][0]} was not reached for these inputs (its {missing[0][1]} was not seen)")
    given = went_on[-1]
    if given is None or given.numel() != len(prompts) * width * given.shape[-1]:
        return found, None
    last = torch.tensor([p[-1] for p in positions], device=given.device)
    rows = given.detach().reshape(len(prompts), width, -1)
    return found, rows[torch.arange(len(prompts), device=given.device), last]


def _stopped(model: Model, inputs: Mapping[str, Any], error: Exception) -> InputError:
    """What to raise when a model's own code refuses an input."""
    sizes = ", ".join(f"{k} {list(v.shape)}" for k, v in inputs.items() if isinstance(v, torch.Tensor))
    why = " ".join(str(error).split())[:300]
    return InputError(f"{model.name} does not run on this input ({sizes}): {type(error).__name__}: {why}")


def by_tokens(model: Model, prompts: Sequence[Encoded]) -> bool:
    """Whether prompts are read token by token: one answer at each of them, decoded from its own state."""
    space = model.space
    per_token = space.per == "position" and space.name != "boxes" and space.activation == "softmax"
    return per_token and model.tail.by == "tokens" and all(p.ids for p in prompts)


def _need_tokens(model: Model, prompts: Sequence[Encoded]) -> None:
    if not by_tokens(model, prompts):
        raise InputError(f"capture() is for models that are read token by token; use logitlab.read for {model.name}")


def states(model: Model, prompt: Encoded, sites: Sequence[Site]) -> tuple[Run, dict[tuple[int, str], torch.Tensor]]:
    """One recorded forward pass over one prompt, and all states of some sites, [batch x positions, width] each.

    Raises:
        InputError: the model does not run on this input (a picture of another size, for instance).
        ModelError: the pass goes another way than on the template, or a site has states of another shape.
    """
    keys = list(dict.fromkeys((site.layer, site.kind) for site in sites))
    if any(kind not in ("resid_pre", "resid_post") for _, kind in keys):
        _ = model.parts
    found: dict[tuple[int, str], torch.Tensor] = {}
    stack, layout = model.stack, model.stack.layout

    def keep(key: tuple[int, str], value: torch.Tensor, scale: float = 1.0) -> None:
        given = value if value.ndim == len(layout.order) else value.unsqueeze(0)
        found[key] = (layout.rows(given) * scale).detach()

    inputs = arguments_of(model, [prompt])
    with model.exclusive(), Taps() as taps:
        trace = Trace(model.module, within=stack.container)
        trace.attach(taps)
        _attach(model, keys, keep, taps)
        try:
            with torch.no_grad():
                output = model.module(**inputs)
        except Exception as error:  # a model's code can raise anything; the reason is passed on
            raise _stopped(model, inputs, error) from error
    missing = [key for key in keys if key not in found]
    calls = [[c for c in trace.calls if c.path == path] for path in dict.fromkeys(b.path for b in stack.blocks)]
    by_path = {c[0].path: c for c in calls if c}
    if missing or any(b.path not in by_path or len(by_path[b.path]) <= b.call for b in stack.blocks):
        raise ModelError(f"{stack.name} was not gone through as on the template")
    made = [by_path[b.path][b.call] for b in stack.blocks]
    run = Run(inputs, copied(output), trace.upstream(made[0].start), tuple(c.output for c in made))
    size = layout.rows(cast(torch.Tensor, first_tensor(run.blocks[-1]))).shape
    bad = next(
        (key for key, rows in found.items() if rows.shape != size and key[1] not in ("head_out", "neuron")), None
    )
    if bad is not None:
        raise ModelError(f"{bad[0]}.{bad[1]} has states of shape {list(found[bad].shape)}, the last block {list(size)}")
    return run, found


def _attach(model: Model, keys: Sequence[tuple[int, str]], keep: Callable[..., None], taps: Taps) -> None:
    """Hook the wanted sites; a module that several blocks share is told apart by counting its calls."""
    wanted: dict[int, list[str]] = defaultdict(list)
    for layer, kind in keys:
        wanted[layer].append(kind)
    layers_of: dict[int, list[int]] = defaultdict(list)
    for layer, block in enumerate(model.stack.blocks):
        layers_of[id(block.module)].append(layer)
    for layers in layers_of.values():
        if any(layer in wanted for layer in layers):
            _attach_block(model, layers, wanted, keep, taps)


OTHER = -1
"""Stands for a call of a block's module that is not part of the stack."""


def _attach_block(
    model: Model, layers: list[int], wanted: dict[int, list[str]], keep: Callable[..., None], taps: Taps
) -> None:
    module = model.stack.blocks[layers[0]].module
    layer_of = {model.stack.blocks[layer].call: layer for layer in layers}
    calls = count()
    current = [OTHER]

    def enter(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current[0] = layer_of.get(next(calls), OTHER)  # a module may also be called outside of the stack
        if "resid_pre" in wanted.get(current[0], ()):
            keep((current[0], "resid_pre"), hidden_input(args, kwargs))

    def leave(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if "resid_post" in wanted.get(current[0], ()):
            keep((current[0], "resid_post"), first_tensor(output))

    taps.before(module, enter)
    for kind in {kind for layer in layers for kind in wanted.get(layer, [])}:
        for part, takers in _modules(model, layers, kind).items():
            taps_input = kind in ("head_out", "neuron")
            hook = _input_hook if taps_input else _output_hook
            (taps.before if taps_input else taps.after)(part, hook(kind, takers, current, wanted, keep))
    taps.after(module, leave)


def _modules(model: Model, layers: list[int], kind: str) -> dict[nn.Module, dict[int, float]]:
    """The modules to hook for a kind, each with the layers it serves and their scales."""
    modules: dict[nn.Module, dict[int, float]] = defaultdict(dict)
    if kind in ("resid_pre", "resid_post"):
        return modules
    for layer in layers:
        projection = _projection(model, (layer, kind))
        component = model.parts[layer].components.get(kind)
        if projection is not None:
            modules[projection.module][layer] = 1.0
        elif component is not None:
            modules[component.module][layer] = component.scale
    return modules


def _output_hook(
    kind: str, scales: dict[int, float], current: list[int], wanted: dict[int, list[str]], keep: Callable[..., None]
) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer = current[0]
        if layer in scales and kind in wanted[layer]:
            keep((layer, kind), first_tensor(output), scales[layer])

    return hook


def _input_hook(
    kind: str, scales: dict[int, float], current: list[int], wanted: dict[int, list[str]], keep: Callable[..., None]
) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = current[0]
        if layer in scales and kind in wanted[layer]:
            keep((layer, kind), hidden_input(args, kwargs))

    return hook
