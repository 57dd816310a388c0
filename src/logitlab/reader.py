"""The main job: run a model, decode its hidden states through a lens, tabulate what they say."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from logitlab.errors import InputError, ModelError, VerificationError
from logitlab.lenses.base import Lens
from logitlab.lenses.logit import LogitLens
from logitlab.logits import Asked, LogitSource, Statistics, statistics
from logitlab.logits.choose import check_max_error, check_precision, choose
from logitlab.logits.independent import independent
from logitlab.logits.statistics import MAX_ERROR
from logitlab.models.capture import Activations, activations_of, by_tokens, keys_of, select_positions
from logitlab.models.encoder import concept_labels
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded, whole_number
from logitlab.models.passes import PASS_TOKENS, Part, joined, parts
from logitlab.models.patches import token_patches
from logitlab.models.sites import Site
from logitlab.models.verify import finite_size, tolerance
from logitlab.models.vocabulary import ColumnLabels, Vocabulary
from logitlab.reading import Array, Prompt, Reading, Target
from logitlab.states import StateReading, check_concepts, pictures_of, read_states
from logitlab.table import Table
from logitlab.targets import VocabularyFilter, allowed_columns, resolve_targets

DECODE_ROWS = 2048
"""Rows whose head inputs are held at once: twice what the native backend works on together."""

GROUP_POSITIONS = 512
"""Positions of short prompts that are decoded together."""

STATISTICS = ("entropy", "kl")
"""Statistics that can be left out of a reading."""


def read(
    model: Model,
    inputs: Any,
    *,
    lens: Lens | None = None,
    sites: str | Site | Iterable[str | Site] | None = None,
    positions: int | slice | Sequence[int] | None = None,
    target: str | int | Sequence[str | int] | None = None,
    top_k: int = 5,
    statistics: str | Iterable[str] = STATISTICS,
    vocabulary: VocabularyFilter | None = None,
    decoder: Any = None,
    concepts: Sequence[Any] | None = None,
    batch_tokens: int | None = None,
    share_prefixes: bool | None = None,
    precision: str = "exact",
    max_error: float = MAX_ERROR,
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Reading:
    """Decode hidden states of a model into statistics over what its own last step gives.

    That is a vocabulary, classes, concepts (similarity to texts) or classes and boxes, see
    ``model.space``. A model with one answer for the whole input (a classifier, CLIP) has a last
    position ``pooled`` for it; its other positions are decoded one by one. A detector's positions are
    its queries.

    Args:
        model: a handle from `logitlab.load` or `logitlab.wrap`.
        inputs: a text, a list of texts, chat messages, token ids, or encoded tensors (padding on
            either side is left out); a picture (path, PIL image, uint8 array), a sound (path, float
            array), ``{"image": ..., "text": ...}``, or a list of such. In an encoder-decoder model they
            go to the encoder.
        lens: the lens; by default the logit lens.
        sites: which sites, for instance ``"12.resid_post"``, ``"mlp_out"``, ``"::4.resid_post"``,
            ``"3.head_out"``, or a list of such; by default the residual stream. The output of the
            last block is always among them.
        positions: which tokens of each prompt: a number (negative counts from its end), a slice,
            several numbers, or None for all.
        target: tokens whose log-probability and rank are wanted, as text that is one token, or ids; of
            classes and concepts their names, or numbers.
        top_k: how many of the most likely tokens to keep in each cell.
        statistics: which of ``entropy`` and ``kl`` are wanted; what is not wanted is not computed.
        vocabulary: which tokens are ranked: a function of a token's label, or ids. Only ranking is
            restricted; probabilities stay normalised over the whole vocabulary.
        decoder: text or ids that the decoder of an encoder-decoder model has already written.
        concepts: texts that a picture is compared with, for models that do that (CLIP, SigLIP).
        batch_tokens: put several prompts into one padded, masked forward pass of at most this many
            tokens (see `logitlab.capture`); by default nothing is padded.
        share_prefixes: whether tokens that several prompts begin with go through the model once (32 or more of
            them, and only where the model was proved to go on from its cache as it would have without a
            break). Sums are then of other shapes, so a prompt's numbers can differ from those that it has
            alone, by what rounding does. By default in float32, where that is not seen, and not in half
            precision. With False a prompt's hidden states do not depend on its company.
        precision: ``"exact"``, ``"screened"`` or ``"auto"``, see `logitlab.logits.statistics`. A screened reading
            has an array ``bound``: what screening can have added to the error of each cell, in nats.
        max_error: nats by which screened statistics may be off.
        backend: ``"auto"``, or one of `logitlab.logits.BACKENDS`.
        progress: called with the numbers of decoded rows done and in all.

    Returns:
        The Reading. Log-probabilities, entropies and divergences are in nats; ``kl`` is
        KL(final distribution || distribution at the site) for the same position.

    Raises:
        InputError: an argument cannot be used; the message says which and what to do.
        ModelError: the hidden states are not finite; the message says from which site on.
        OutOfMemoryError: there is not enough memory for a forward pass.

    Example:
        ``read(model, "The capital of France is", target=" Paris").at(position=-1).rank``
    """
    check_concepts(model, concepts)
    prompts = model.encode(inputs, decoder=decoder, concepts=concepts)
    top_k = whole_number(top_k, "top_k")
    chosen = model.select_sites(sites)
    if model.last_site not in chosen:
        chosen = sorted([*chosen, model.last_site], key=lambda s: s.order)
    lens = LogitLens() if lens is None else lens
    lens.check(model, chosen)
    columns = model.columns
    if model.space.name == "concepts":
        columns = ColumnLabels(concept_labels(concepts, _n_concepts(model, prompts)))
    targets = resolve_targets(model, target, columns)
    wanted = _wanted(statistics)
    check_precision(precision)
    check_max_error(max_error)
    asked = Asked(
        top_k=top_k,
        targets=torch.tensor([t.id for t in targets], dtype=torch.long) if targets else None,
        allowed=allowed_columns(columns, vocabulary),
        entropy="entropy" in wanted,
        kl="kl" in wanted,
        precision=precision,
        max_error=float(max_error),
        backend=backend,
    )
    settings: dict[str, Any] = {
        "top_k": top_k,
        "statistics": list(wanted),
        "vocabulary_filter": vocabulary is not None,
        "batch_tokens": batch_tokens,
        "backend": backend,
        "precision": precision,
        "seed": torch.initial_seed(),
    }
    provenance = _provenance(model, chosen, lens, settings)
    if not by_tokens(model, prompts):
        settings["backend"] = choose(backend, LogitSource(lambda z: z, model.vocab_size))
        if model.space.activation == "sigmoid":
            settings["backend"] = "independent"  # every column is a question of its own
        found: list[StateReading] = []
        for n, prompt in enumerate(prompts):
            with model.exclusive():
                found.append(
                    read_states(
                        model,
                        prompt,
                        chosen,
                        lambda count, n=n: select_positions(positions, count, n),
                        lens=lens,
                        asked=asked,
                    )
                )
            if progress is not None:
                progress(n + 1, len(prompts))
        reading = _reading_of_states(prompts, found, chosen, targets, columns, provenance)
        _note_bound(settings, reading.arrays, max_error)
        return reading
    settings["backend"] = choose(backend, model.tail.source)
    where = [select_positions(positions, len(p.ids), n) for n, p in enumerate(prompts)]
    table = Table(where, len(chosen))
    passes = parts(
        model,
        prompts,
        keys_of(model, chosen),
        where,
        batch_tokens=batch_tokens,
        share=share_prefixes,
    )
    cut: dict[int, bool] = {}
    shared: dict[int, bool] = {}
    for part in _grouped(_noted(_checked(model, passes, prompts, chosen), cut, shared)):
        with model.exclusive():
            for rows, result in _decoded(model, activations_of(model, part, prompts, chosen), lens, asked):
                table.put(part, rows, result)
                if progress is not None:
                    progress(table.done * len(chosen), table.total * len(chosen))
        del part  # so that it can be freed while the next pass is run
    settings["pass_tokens"] = PASS_TOKENS if any(cut.values()) else None
    settings["share_prefixes"] = any(shared.values())
    _note_bound(settings, table.arrays, max_error)
    arrays = table.arrays
    return Reading(
        prompts=tuple(_prompt(model, p, w) for p, w in zip(prompts, where, strict=True)),
        sites=tuple(map(str, chosen)),
        targets=tuple(targets),
        labels=_labels(columns, arrays, targets),
        arrays=arrays,
        provenance=provenance,
        completions=_completions(model, prompts, where, arrays["top_id"]),
    )


def _wanted(names: str | Iterable[str] | None) -> tuple[str, ...]:
    """The statistics that a caller names, in the order of `STATISTICS`."""
    if names is None:
        raise InputError(f"statistics is None; name some of {', '.join(STATISTICS)}, or () for top tokens alone")
    given = [names] if isinstance(names, str) else list(names)
    bad = next((name for name in given if name not in STATISTICS), None)
    if bad is not None:
        raise InputError(
            f"unknown statistic {bad!r}: there are {', '.join(STATISTICS)}; top tokens are always there, and "
            "target= adds log-probabilities and ranks"
        )
    return tuple(name for name in STATISTICS if name in given)


def _note_bound(settings: dict[str, Any], arrays: Mapping[str, Array], max_error: float) -> None:
    """Record what screening was allowed, and what it can have added."""
    if "bound" in arrays:
        settings["max_error"] = float(max_error)
        settings["error_bound"] = float(np.nanmax(arrays["bound"]))


def _labels(columns: Vocabulary, arrays: Mapping[str, Array], targets: Sequence[Target]) -> dict[int, str]:
    ids = {int(i) for i in np.unique(arrays["top_id"]) if i >= 0} | {t.id for t in targets}
    return {i: columns.label(i) for i in sorted(ids)}


def _n_concepts(model: Model, prompts: Sequence[Encoded]) -> int:
    """Number of columns of a comparison: texts for a picture, pictures for a text."""
    name = "pixel_values" if model.tail.texts else "input_ids"
    sizes = {int(p.extra[name].shape[0]) for p in prompts if name in p.extra}
    if len(sizes) != 1:
        raise InputError("all inputs of one reading must be compared with the same concepts")
    return sizes.pop()


def _reading_of_states(
    prompts: Sequence[Encoded],
    found: Sequence[StateReading],
    sites: Sequence[Site],
    targets: Sequence[Target],
    columns: Vocabulary,
    provenance: Mapping[str, Any],
) -> Reading:
    where = [r.positions for r in found]
    table = Table(where, len(sites))
    for n, one in enumerate(found):
        table.put_prompt(n, one.statistics, one.boxes)
    arrays = table.arrays
    return Reading(
        prompts=tuple(
            Prompt(p.text, p.ids, r.tokens, r.positions, r.pictures) for p, r in zip(prompts, found, strict=True)
        ),
        sites=tuple(map(str, sites)),
        targets=tuple(targets),
        labels=_labels(columns, arrays, targets),
        arrays=arrays,
        provenance=provenance,
    )


def _checked(model: Model, passes: Iterable[Part], prompts: Sequence[Encoded], sites: Sequence[Site]) -> Iterator[Part]:
    """Parts whose states are finite and whose last ones the model goes on from as the tail does."""
    for part in passes:
        activations = activations_of(model, part, prompts, sites)
        _check_finite(activations, part.owners)
        with model.exclusive():
            _check_answers(model, activations, part.owners)
        del activations
        yield part
        del part  # so that it can be freed while the next pass is run


def _noted(passes: Iterable[Part], cut: dict[int, bool], shared: dict[int, bool]) -> Iterator[Part]:
    """Parts, with a note for each prompt of how it was run; one that is run again counts as it was then."""
    for part in passes:
        for n in (n for owners in part.owners for n in owners):
            cut[n], shared[n] = part.continued, part.shared
        yield part
        del part  # so that it can be freed while the next pass is run


def _grouped(passes: Iterable[Part]) -> Iterator[Part]:
    """Parts of short prompts together, so that the head is gone through once for many of them."""
    waiting: list[Part] = []
    for part in passes:
        if waiting and sum(p.size for p in waiting) + part.size > GROUP_POSITIONS:
            yield joined(waiting)
            waiting = []
        waiting.append(part)
        if 4 * part.size > 3 * GROUP_POSITIONS:  # large ones are not held while the next pass is run
            del part
            together, waiting = joined(waiting), []
            yield together
            del together
    if waiting:
        yield joined(waiting)


def _check_finite(activations: Activations, owners: Sequence[Sequence[int]]) -> None:
    """Say where hidden states stop being finite: the first site, then the first prompt and position."""
    first_sites = {(site.layer, site.kind): site for site in reversed(activations.sites)}  # heads share one tensor
    for key, site in sorted(first_sites.items(), key=lambda item: item[1].order):
        rows = activations.kept[key]
        bad = (~torch.isfinite(rows).all(dim=-1)).nonzero()
        if bad.numel():
            row = int(bad[0])
            for n, prompts in enumerate(owners):
                part = activations.rows_of(n)
                if part.start <= row < part.stop:
                    position = activations.positions[n][row - part.start]
                    raise ModelError(
                        f"hidden states are NaN or infinite from site {site} on "
                        f"(prompt {prompts[0]}, position {position}): "
                        "load the model in float32, or look at its weights"
                    )


def _check_answers(model: Model, activations: Activations, owners: Sequence[Sequence[int]]) -> None:
    """The tail must go on from the last states as the model itself did, for these very prompts."""
    if activations.answers is None:
        return
    last = torch.tensor([activations.rows_of(n).stop - 1 for n in range(len(owners))])
    states = _final_states(activations, model)
    states = states[last.to(states.device)]
    tail = model.tail
    ours = (tail.logits(states) if tail.head is None else tail.head_input(states)).to(activations.answers.device)
    gaps = (ours.double() - activations.answers.double()).abs().amax(1)
    for n, gap in enumerate(gaps):
        if not float(gap) <= tolerance(model.dtype, finite_size(activations.answers[n].float())):
            raise VerificationError(
                f"the last state of prompt {owners[n][0]} decoded is not what the model itself goes on with (they "
                f"differ by {float(gap):.2g}): for this input the model does something else than on the few tokens "
                "that it was verified with; this reading would be wrong"
            )


def _decoded(model: Model, activations: Activations, lens: Lens, asked: Asked) -> Iterator[tuple[slice, Statistics]]:
    """Statistics [sites, rows] of all sites against the last one, for a few rows of a pass at a time."""
    sites = activations.sites
    n_rows = sum(len(p) for p in activations.positions)
    wide = max(1, DECODE_ROWS // max(1, min(len(sites), 64)))
    wide = wide // 32 * 32 or wide  # whole panels of the native backend
    tall = max(1, DECODE_ROWS // min(wide, n_rows))
    for start in range(0, n_rows, wide):
        rows = slice(start, min(start + wide, n_rows))
        part = _rows_of(activations, rows)
        final = model.tail.prepare(_final_states(part, model)) if asked.kl else None
        stacked: list[Statistics] = []
        for i in range(0, len(sites), tall):
            group = sites[i : i + tall]
            hidden = part.stacked(group)
            hidden = _transported(hidden, group, lens)
            x = model.tail.prepare(hidden.reshape(-1, hidden.shape[-1]))
            x = x.reshape(len(group), -1, x.shape[-1])
            del hidden  # not needed while the head is gone through
            stacked.append(asked.of(x, model.tail.source, None if final is None else final.to(x.device)))
        yield rows, Statistics.join(stacked, dim=0)


def _transported(hidden: torch.Tensor, sites: Sequence[Site], lens: Lens) -> torch.Tensor:
    """Hidden states [sites, rows, width] behind the lens, in place where the dtype allows it."""
    for i, site in enumerate(sites):
        moved = lens.transport(hidden[i], site)
        if moved.dtype != hidden.dtype:
            hidden = hidden.to(torch.promote_types(moved.dtype, hidden.dtype))
        hidden[i] = moved
    return hidden


def _final_states(activations: Activations, model: Model) -> torch.Tensor:
    """Hidden states that the model itself decodes (the last block's output), never through a lens."""
    return activations.kept[model.last_site.layer, model.last_site.kind]


def _rows_of(activations: Activations, rows: slice) -> Activations:
    kept = {key: value[rows] for key, value in activations.kept.items()}
    return Activations(activations.sites, activations.prompts, activations.positions, kept, activations.projections)


def decode(
    model: Model,
    hidden: torch.Tensor,
    *,
    targets: Sequence[int] | None = None,
    top_k: int = 5,
    precision: str = "exact",
    backend: str = "auto",
) -> Statistics:
    """Decode any vectors of the residual stream's width: value vectors, steering vectors, directions.

    Args:
        model: the model whose tail decodes them.
        hidden: [rows, width] or [groups, rows, width].
        targets: token ids whose log-probability and rank are wanted.
        top_k: how many of the most likely tokens to keep.
        precision: as in `read`.
        backend: as in `read`.

    Raises:
        InputError: the vectors have another width.

    Example:
        ``decode(model, model.value_vectors(12, [0, 1])).top_ids`` has shape [1, 2, 5].
    """
    if hidden.ndim not in (2, 3):
        raise InputError(f"the vectors have shape {tuple(hidden.shape)}; give [rows, width] or [groups, rows, width]")
    if not bool(torch.isfinite(hidden).all()):
        raise InputError("the vectors are not finite: some values are NaN or infinite")
    if hidden.shape[-1] != model.width:
        raise InputError(
            f"the vectors have width {hidden.shape[-1]}; the hidden states of {model.name} have {model.width}"
        )
    with model.exclusive():
        if model.space.activation == "sigmoid":
            check_precision(precision)
            choose(backend, LogitSource(lambda z: z, model.vocab_size))
            z = model.tail.logits(hidden.reshape(-1, model.width)).reshape(*hidden.shape[:-1], -1)
            ids = None if targets is None else torch.tensor(list(targets), dtype=torch.long)
            found = independent(z if z.ndim == 3 else z.unsqueeze(0), top_k=top_k, targets=ids)
            found.bound = None if precision == "exact" else torch.zeros_like(found.logsumexp)
            return found
        flat = model.tail.prepare(hidden.reshape(-1, model.width))
        rows = flat.reshape(*hidden.shape[:-1], flat.shape[-1])
        ids = None if targets is None else torch.tensor(list(targets), dtype=torch.long)
        return statistics(rows, model.tail.source, top_k=top_k, targets=ids, precision=precision, backend=backend)


def _prompt(model: Model, prompt: Encoded, positions: Sequence[int]) -> Prompt:
    labels = model.vocabulary.labels(prompt.ids)
    grids = token_patches(model.module, model.processor, prompt.ids, prompt.extra) if prompt.extra else []
    for _, patches in grids:
        for position, row, column in patches:
            labels[position] = f"patch {row},{column}"
    pictures = pictures_of(model, prompt, grids, prompt.extra.get("pixel_values")) if prompt.extra else ()
    return Prompt(prompt.text, prompt.ids, tuple(labels), tuple(positions), pictures)


def _completions(
    model: Model, prompts: Sequence[Encoded], where: Sequence[Sequence[int]], top: Array
) -> dict[tuple[int, int], dict[int, str]]:
    """Labels of predicted tokens that finish a character which the prompt has begun."""
    found: dict[tuple[int, int], dict[int, str]] = {}
    for n, (prompt, positions) in enumerate(zip(prompts, where, strict=True)):
        for slot, position in enumerate(positions):
            pending = model.vocabulary.pending(prompt.ids[: position + 1])
            if not pending:
                continue
            ids = [int(i) for i in np.unique(top[n, :, slot])]
            labels = {i: text for i in ids if (text := model.vocabulary.completed(pending, i)) is not None}
            if labels:
                found[n, slot] = labels
    return found


@cache
def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("logitlab", "torch", "transformers", "numpy")}
    return found | {"python": platform.python_version()}


def _provenance(model: Model, sites: Sequence[Site], lens: Lens, settings: dict[str, Any]) -> dict[str, Any]:
    components = any(site.kind not in ("resid_pre", "resid_post") for site in sites)
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "revision": getattr(getattr(model.module, "config", None), "_commit_hash", None),
        "architecture": type(model.module).__name__,
        "stack": model.stack.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "verification": model.verification.as_dict(decompositions=components),
        "space": {"name": model.space.name, "per": model.space.per, "activation": model.space.activation},
        "lens": lens.describe(),
        "settings": settings,
        "versions": dict(_versions()),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
