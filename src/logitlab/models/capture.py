"""Run a model and keep what it left at chosen sites and positions, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch

from logitlab.errors import InputError, ModelError, VerificationError
from logitlab.models.decompose import Projection
from logitlab.models.handle import Model
from logitlab.models.hooks import Taps, first_tensor
from logitlab.models.inputs import Encoded, whole_number
from logitlab.models.output import Output, output_of
from logitlab.models.passes import Part, arguments_of, parts, stopped
from logitlab.models.sites import Site
from logitlab.models.trace import Run, Trace, copied
from logitlab.models.verify import finite_size, max_difference, tolerance
from logitlab.models.watch import Key, projection_of, watch


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
        answers: of a single pass, what the model itself went on with at the last kept position of each prompt,
            to hold the tail against: the head's input where the pass stopped there, else the logits.
    """

    sites: tuple[Site, ...]
    prompts: tuple[Encoded, ...]
    positions: tuple[tuple[int, ...], ...]
    kept: dict[Key, torch.Tensor]
    projections: dict[Key, Projection]
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
    share_prefixes: bool | None = None,
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
            differently (``benchmarks/batching.py`` measures by how much). By default nothing is padded.
        share_prefixes: whether tokens that several prompts begin with go through the model once, see
            `logitlab.read`; by default in float32. With False a prompt's values do not depend on its company.
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
    return capture_encoded(model, prompts, chosen, kept_positions, batch_tokens, progress, share=share_prefixes)


def capture_encoded(
    model: Model,
    prompts: Sequence[Encoded],
    sites: Sequence[Site],
    positions: Sequence[Sequence[int]],
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    share: bool | None = None,
) -> Activations:
    """`capture` for inputs that are already encoded and checked."""
    keys = keys_of(model, sites)
    table: dict[Key, torch.Tensor] = {}
    starts = [0, *accumulate(len(p) for p in positions)]
    done: set[int] = set()
    for part in parts(model, prompts, keys, positions, batch_tokens=batch_tokens, share=share):
        for rows, to in _places(part, positions, starts):
            for key, values in part.kept.items():
                if key not in table:
                    table[key] = values.new_empty(starts[-1], values.shape[1])
                table[key][to] = values[rows]
        done |= {n for owners in part.owners for n in owners}
        if progress is not None:
            progress(len(done), len(prompts))
    return Activations(
        tuple(sites),
        tuple(prompts),
        tuple(tuple(p) for p in positions),
        table,
        projections_of(model, keys),
    )


def _places(
    part: Part, positions: Sequence[Sequence[int]], starts: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of a part, and the rows of the whole that they are for, prompt by prompt."""
    start = 0
    for owners, kept in zip(part.owners, part.positions, strict=True):
        row_of = {position: start + i for i, position in enumerate(kept)}
        for n in owners:
            pairs = [(row_of[p], starts[n] + i) for i, p in enumerate(positions[n]) if p in row_of]
            yield [a for a, _ in pairs], [b for _, b in pairs]
        start += len(kept)


def activations_of(model: Model, part: Part, prompts: Sequence[Encoded], sites: Sequence[Site]) -> Activations:
    """What a pass has left, as activations of the first prompt of each of its sequences."""
    return Activations(
        tuple(sites),
        tuple(prompts[owners[0]] for owners in part.owners),
        part.positions,
        part.kept,
        projections_of(model, list(part.kept)),
        part.answers,
    )


def keys_of(model: Model, sites: Sequence[Site]) -> list[Key]:
    """Layers and kinds that have to be watched for some sites."""
    keys = list(dict.fromkeys((site.layer, site.kind) for site in sites))
    if any(kind not in ("resid_pre", "resid_post") for _, kind in keys):
        _ = model.parts  # taking blocks apart runs the model: not while it is watched
    return keys


def projections_of(model: Model, keys: Sequence[Key]) -> dict[Key, Projection]:
    """The maps of those keys that have one."""
    return {key: p for key in keys if (p := projection_of(model, key)) is not None}


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


def by_tokens(model: Model, prompts: Sequence[Encoded]) -> bool:
    """Whether prompts are read token by token: one answer at each of them, decoded from its own state."""
    space = model.space
    per_token = space.per == "position" and space.name != "boxes" and space.activation == "softmax"
    return per_token and model.tail.by == "tokens" and all(p.ids for p in prompts)


def _need_tokens(model: Model, prompts: Sequence[Encoded]) -> None:
    if not by_tokens(model, prompts):
        raise InputError(f"capture() is for models that are read token by token; use logitlab.read for {model.name}")


def states(model: Model, prompt: Encoded, sites: Sequence[Site]) -> tuple[Run, dict[Key, torch.Tensor]]:
    """One recorded forward pass over one prompt, and all states of some sites, [batch x positions, width] each.

    Raises:
        InputError: the model does not run on this input (a picture of another size, for instance).
        ModelError: the pass goes another way than on the template, or a site has states of another shape.
    """
    keys = keys_of(model, sites)
    found: dict[Key, torch.Tensor] = {}
    stack, layout = model.stack, model.stack.layout

    def keep(key: Key, value: torch.Tensor, scale: float = 1.0) -> None:
        given = value if value.ndim == len(layout.order) else value.unsqueeze(0)
        found[key] = (layout.rows(given) * scale).detach()

    inputs = arguments_of(model, [prompt])
    with model.exclusive(), Taps() as taps:
        trace = Trace(model.module, within=stack.container)
        trace.attach(taps)
        watch(model, keys, keep, taps)
        try:
            with torch.no_grad():
                output = model.module(**inputs)
        except Exception as error:  # a model's code can raise anything; the reason is passed on
            raise stopped(model, inputs, error) from error
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


def checked_states(model: Model, prompt: Encoded, sites: Sequence[Site]) -> tuple[Run, dict[Key, torch.Tensor], Output]:
    """`states`, and the model's own answer, which the last state decoded must be, for this very input.

    Raises:
        VerificationError: it is not.
        ModelError: a state is not finite, or as for `states`.
    """
    run, rows = states(model, prompt, sites)
    own = output_of(run.output, texts=model.tail.texts, pixels=model.tail.pixels)
    if own is None:
        raise ModelError(f"{model.name} returned no logits for this input")
    for (layer, kind), values in rows.items():
        if not bool(torch.isfinite(values).all()):
            raise ModelError(
                f"hidden states are NaN or infinite at site {layer}.{kind}: "
                "load the model in float32, or look at its weights"
            )
    last = first_tensor(run.blocks[-1])
    assert last is not None
    gap = max_difference(model.tail.output(last, run).flat, own.flat)
    if not gap <= tolerance(model.dtype, finite_size(own.flat)):
        raise VerificationError(
            f"the last state of {model.stack.name} decoded differs from the model's own answer for this input by "
            f"{gap:.2g}; this reading would be wrong"
        )
    return run, rows, own


def rows_at(model: Model, rows: Mapping[Key, torch.Tensor], site: Site) -> torch.Tensor:
    """Hidden states [rows, width] of one site, heads and neurons included, of what `states` gives."""
    values = rows[site.layer, site.kind]
    if site.index is None:
        return values
    part = model.parts[site.layer].heads if site.kind == "head_out" else model.parts[site.layer].neurons
    assert part is not None
    return part.expand(values, [site.index])[:, 0]
