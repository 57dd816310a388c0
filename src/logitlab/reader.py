"""The main job: run a model, decode its hidden states through a lens, tabulate what they say."""

from __future__ import annotations

import datetime
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from logitlab.errors import InputError, ModelError, VerificationError
from logitlab.lenses.base import Lens
from logitlab.lenses.logit import LogitLens
from logitlab.logits import Statistics, statistics
from logitlab.logits.independent import independent
from logitlab.models.capture import Activations, by_tokens, capture_encoded, select_positions
from logitlab.models.encoder import concept_labels
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded, check_text, whole_number
from logitlab.models.patches import token_patches
from logitlab.models.sites import Site
from logitlab.models.verify import finite_size, tolerance
from logitlab.models.vocabulary import ColumnLabels, Vocabulary
from logitlab.reading import Array, Prompt, Reading, Target
from logitlab.states import StateReading, check_concepts, pictures_of, read_states

DECODE_ROWS = 4096
"""Rows whose head inputs are held at once."""

GROUP_POSITIONS = 4096
"""Positions whose hidden states are held at once (more only where one prompt is longer)."""

VocabularyFilter = Callable[[str], bool] | Sequence[int] | torch.Tensor


def read(
    model: Model,
    inputs: Any,
    *,
    lens: Lens | None = None,
    sites: str | Site | Iterable[str | Site] | None = None,
    positions: int | slice | Sequence[int] | None = None,
    target: str | int | Sequence[str | int] | None = None,
    top_k: int = 5,
    vocabulary: VocabularyFilter | None = None,
    decoder: Any = None,
    concepts: Sequence[Any] | None = None,
    batch_tokens: int | None = None,
    backend: str = "tiled",
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
        vocabulary: which tokens are ranked: a function of a token's label, or ids. Only ranking is
            restricted; probabilities stay normalised over the whole vocabulary.
        decoder: text or ids that the decoder of an encoder-decoder model has already written.
        concepts: texts that a picture is compared with, for models that do that (CLIP, SigLIP).
        batch_tokens: put several prompts into one padded, masked forward pass of at most this many
            tokens; by default each has its own, so that its numbers do not depend on its company
            (see `logitlab.capture`).
        backend: ``"tiled"``, or ``"reference"`` for plain float64.
        progress: called with the numbers of decoded rows done and in all.

    Returns:
        The Reading. Log-probabilities, entropies and divergences are in nats; ``kl`` is
        KL(final distribution || distribution at the site) for the same position.

    Raises:
        InputError: an argument cannot be used; the message says which and what to do.
        ModelError: the hidden states are not finite; the message says from which site on.

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
    allowed = _allowed(columns, vocabulary)
    provenance = _provenance(model, chosen, lens, top_k, vocabulary is not None, backend, batch_tokens)
    if not by_tokens(model, prompts):
        ids = torch.tensor([t.id for t in targets], dtype=torch.long) if targets else None
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
                        targets=ids,
                        top_k=top_k,
                        allowed=allowed,
                        backend=backend,
                    )
                )
            if progress is not None:
                progress(n + 1, len(prompts))
        return _reading_of_states(prompts, found, chosen, targets, columns, provenance)
    where = [select_positions(positions, len(p.ids), n) for n, p in enumerate(prompts)]
    total = len(chosen) * sum(len(w) for w in where)
    results: list[Statistics] = []
    done = 0

    def tell(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    for group in _groups(where):
        activations = capture_encoded(model, prompts[group], chosen, where[group], batch_tokens)
        _check_finite(activations, group.start)
        with model.exclusive():
            _check_answers(model, activations, group.start)
            results.append(_decode(model, activations, lens, targets, top_k, allowed, backend, tell))
    result = Statistics.join(results, dim=1)
    arrays = _arrays(result, where, len(chosen))
    return Reading(
        prompts=tuple(_prompt(model, p, w) for p, w in zip(prompts, where, strict=True)),
        sites=tuple(map(str, chosen)),
        targets=tuple(targets),
        labels=_labels(columns, arrays, targets),
        arrays=arrays,
        provenance=provenance,
        completions=_completions(model, prompts, where, arrays["top_id"]),
    )


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
    arrays = _arrays(Statistics.join([r.statistics for r in found], dim=1), where, len(sites))
    if all(r.boxes is not None for r in found):
        boxes = torch.cat([r.boxes for r in found if r.boxes is not None], dim=1)
        arrays["box"] = _table(boxes, np.float32, where, len(sites))
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


def decode(
    model: Model,
    hidden: torch.Tensor,
    *,
    targets: Sequence[int] | None = None,
    top_k: int = 5,
    backend: str = "tiled",
) -> Statistics:
    """Decode any vectors of the residual stream's width: value vectors, steering vectors, directions.

    Args:
        model: the model whose tail decodes them.
        hidden: [rows, width] or [groups, rows, width].
        targets: token ids whose log-probability and rank are wanted.
        top_k: how many of the most likely tokens to keep.
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
            z = model.tail.logits(hidden.reshape(-1, model.width)).reshape(*hidden.shape[:-1], -1)
            ids = None if targets is None else torch.tensor(list(targets), dtype=torch.long)
            return independent(z if z.ndim == 3 else z.unsqueeze(0), top_k=top_k, targets=ids)
        flat = model.tail.prepare(hidden.reshape(-1, model.width))
        rows = flat.reshape(*hidden.shape[:-1], flat.shape[-1])
        ids = None if targets is None else torch.tensor(list(targets), dtype=torch.long)
        return statistics(rows, model.tail.source, top_k=top_k, targets=ids, backend=backend)


def resolve_targets(
    model: Model, target: str | int | Sequence[str | int] | None, columns: Vocabulary | None = None
) -> list[Target]:
    """The tokens, classes or concepts that a caller names, as text or as ids.

    Args:
        model: the model.
        target: what the caller gave.
        columns: labels of the output's columns; by default the model's.

    Raises:
        InputError: an id is not in the vocabulary, or a text is not exactly one token; the message
            lists the tokens and what the text would be with or without a space before it.
    """
    if target is None:
        return []
    columns = model.columns if columns is None else columns
    single: Any = target
    alone = isinstance(single, str) or not hasattr(single, "__iter__") or getattr(single, "ndim", 1) == 0
    items: list[Any] = [single] if alone else list(single)
    found: list[Target] = []
    for item in items:
        if not isinstance(item, str):
            number = whole_number(item, "target")
        else:
            number = _one_column(columns, item) if isinstance(columns, ColumnLabels) else _one_token(model, item)
        if not 0 <= number < columns.size:
            raise InputError(f"target id {number} is not in the vocabulary (0 to {columns.size - 1})")
        if number not in [t.id for t in found]:
            found.append(Target(number, columns.label(number)))
    return found


def target_notes(model: Model, targets: Sequence[Target]) -> list[str]:
    """A sentence for every target that is another token with, or without, a space before it."""
    notes: list[str] = []
    for t in targets:
        other = t.token[1:] if t.token.startswith(" ") else f" {t.token}"
        ids = _ids(model, other) if model.tokenizer is not None and other.strip() else []
        if len(ids) == 1 and ids[0] != t.id:
            notes.append(f"target {t.token!r} is token {t.id}; {other!r} is another token, {ids[0]}")
    return notes


def _one_column(columns: ColumnLabels, text: str) -> int:
    """The class or concept that a text names: exactly, or as a word of only one of them."""
    wanted = text.strip().lower()
    names = [name.lower() for name in columns.names]
    exact = [i for i, name in enumerate(names) if name == wanted]
    if len(exact) == 1:
        return exact[0]
    near = [i for i, name in enumerate(names) if wanted and wanted in re.split(r",\s*", name)]
    near = near or [i for i, name in enumerate(names) if wanted and wanted in name]
    if len(near) == 1:
        return near[0]
    some = [columns.names[i] for i in (near or range(len(names)))][:8]
    problem = f"fits {len(near)} of the columns" if near else f"is none of the {len(names)} columns"
    raise InputError(f"target {text!r} {problem}: {', '.join(some)}{' ...' if len(near or names) > 8 else ''}")


def _one_token(model: Model, text: str) -> int:
    if model.tokenizer is None:
        raise InputError(f"target {text!r}: this model has no tokenizer, so give a token id (id:N)")
    if not text:
        raise InputError("the target is empty: give a token such as ' Paris', or an id")
    check_text(text, "the target")
    ids = _ids(model, text)
    if len(ids) == 1 and model.vocabulary.label(ids[0]) in (text, f" {text}"):
        return ids[0]
    pieces = ", ".join(f"{model.vocabulary.label(i)!r} ({i})" for i in ids)
    other = text[1:] if text.startswith(" ") else f" {text}"
    hint = _ids(model, other) if other.strip() else []
    with_or_without = "without" if text.startswith(" ") else "with"
    advice = (
        f"{with_or_without} a space before it, {other!r} is one token ({hint[0]})"
        if len(hint) == 1
        else "give one of them, or an id"
    )
    count = "another token" if len(ids) == 1 else f"{len(ids)} tokens"
    raise InputError(f"target {text!r} is {count} for this model: {pieces}; {advice}")


def _ids(model: Model, text: str) -> list[int]:
    return [int(i) for i in model.tokenizer(text, add_special_tokens=False)["input_ids"]]


def _allowed(columns: Vocabulary, vocabulary: VocabularyFilter | None) -> torch.Tensor | None:
    if vocabulary is None:
        return None
    allowed = torch.zeros(columns.size, dtype=torch.bool)
    if callable(vocabulary) and not isinstance(vocabulary, torch.Tensor):
        ids = [i for i in range(columns.size) if vocabulary(columns.label(i))]
    else:
        values: Any = torch.as_tensor(vocabulary)
        if values.dtype == torch.bool:
            if values.shape != allowed.shape:
                raise InputError(
                    f"the vocabulary mask has shape {tuple(values.shape)}; the vocabulary has {columns.size} entries"
                )
            values = values.nonzero().squeeze(1)
        if values.is_floating_point():
            raise InputError("the vocabulary filter holds fractions; give token ids, a boolean mask, or a function")
        ids = [int(i) for i in values.reshape(-1).tolist()]
        bad = next((i for i in ids if not 0 <= i < columns.size), None)
        if bad is not None:
            raise InputError(f"the vocabulary filter names id {bad}; ids go from 0 to {columns.size - 1}")
    allowed[ids] = True
    if not ids:
        raise InputError("the vocabulary filter leaves no token to rank")
    return allowed


def _groups(where: Sequence[Sequence[int]]) -> Iterator[slice]:
    """Cut the prompts into runs of at most `GROUP_POSITIONS` positions."""
    start = size = 0
    for n, positions in enumerate(where):
        if n > start and size + len(positions) > GROUP_POSITIONS:
            yield slice(start, n)
            start, size = n, 0
        size += len(positions)
    yield slice(start, len(where))


def _check_finite(activations: Activations, first: int) -> None:
    """Say where hidden states stop being finite: the first site, then the first prompt and position."""
    first_sites = {(site.layer, site.kind): site for site in reversed(activations.sites)}  # heads share one tensor
    for key, site in sorted(first_sites.items(), key=lambda item: item[1].order):
        rows = activations.kept[key]
        bad = (~torch.isfinite(rows).all(dim=-1)).nonzero()
        if bad.numel():
            row = int(bad[0])
            for n in range(len(activations.prompts)):
                part = activations.rows_of(n)
                if part.start <= row < part.stop:
                    position = activations.positions[n][row - part.start]
                    raise ModelError(
                        f"hidden states are NaN or infinite from site {site} on "
                        f"(prompt {first + n}, position {position}): "
                        "load the model in float32, or look at its weights"
                    )


def _check_answers(model: Model, activations: Activations, first: int) -> None:
    """The tail must go on from the last states as the model itself did, for these very prompts."""
    if activations.answers is None:
        return
    last = torch.tensor([activations.rows_of(n).stop - 1 for n in range(len(activations.prompts))])
    states = _final_states(activations, model)
    states = states[last.to(states.device)]
    tail = model.tail
    ours = (tail.logits(states) if tail.head is None else tail.head_input(states)).to(activations.answers.device)
    gaps = (ours.double() - activations.answers.double()).abs().amax(1)
    for n, gap in enumerate(gaps):
        if not float(gap) <= tolerance(model.dtype, finite_size(activations.answers[n].float())):
            raise VerificationError(
                f"the last state of prompt {first + n} decoded is not what the model itself goes on with (they differ "
                f"by {float(gap):.2g}): for this input the model does something else than on the few tokens that "
                "it was verified with; this reading would be wrong"
            )


def _decode(
    model: Model,
    activations: Activations,
    lens: Lens,
    targets: Sequence[Target],
    top_k: int,
    allowed: torch.Tensor | None,
    backend: str,
    tell: Callable[[int], None],
) -> Statistics:
    """Statistics [sites, rows] of all sites against the last one."""
    sites = activations.sites
    n_rows = sum(len(p) for p in activations.positions)
    ids = torch.tensor([t.id for t in targets], dtype=torch.long) if targets else None
    per_pass = max(1, DECODE_ROWS // max(1, min(len(sites), 64)))
    columns: list[Statistics] = []
    for start in range(0, n_rows, per_pass):
        rows = slice(start, min(start + per_pass, n_rows))
        part = _rows_of(activations, rows)
        final = model.tail.prepare(_final_states(part, model))
        stacked: list[Statistics] = []
        tall = max(1, DECODE_ROWS // (rows.stop - rows.start))
        for i in range(0, len(sites), tall):
            group = sites[i : i + tall]
            hidden = part.stacked(group)
            hidden = torch.stack([lens.transport(h, site) for h, site in zip(hidden, group, strict=True)])
            x = model.tail.prepare(hidden.reshape(-1, hidden.shape[-1])).reshape(len(group), -1, final.shape[-1])
            stacked.append(
                statistics(
                    x,
                    model.tail.source,
                    top_k=top_k,
                    targets=ids,
                    allowed=allowed,
                    reference=final.to(x.device),
                    backend=backend,
                )
            )
            tell(len(group) * (rows.stop - rows.start))
        columns.append(Statistics.join(stacked, dim=0))
    return Statistics.join(columns, dim=1)


def _final_states(activations: Activations, model: Model) -> torch.Tensor:
    """Hidden states that the model itself decodes (the last block's output), never through a lens."""
    return activations.kept[model.last_site.layer, model.last_site.kind]


def _rows_of(activations: Activations, rows: slice) -> Activations:
    kept = {key: value[rows] for key, value in activations.kept.items()}
    return Activations(activations.sites, activations.prompts, activations.positions, kept, activations.projections)


def _arrays(result: Statistics, where: Sequence[Sequence[int]], n_sites: int) -> dict[str, Array]:
    """Arrays [prompts, sites, positions, ...] from statistics [sites, rows, ...]."""
    named = {
        "top_id": (result.top_ids, np.int64),
        "top_logprob": (result.top_logprob, np.float32),
        "entropy": (result.entropy, np.float32),
        "kl": (result.kl, np.float32),
        "target_logprob": (result.target_logprob, np.float32),
        "target_rank": (result.target_rank, np.int64),
    }
    return {
        name: _table(tensor, dtype, where, n_sites) for name, (tensor, dtype) in named.items() if tensor is not None
    }


def _table(tensor: torch.Tensor, dtype: Any, where: Sequence[Sequence[int]], n_sites: int) -> Array:
    """[prompts, sites, positions, ...] from [sites, rows, ...], short prompts filled up."""
    values = tensor.cpu().numpy()
    width = max(len(w) for w in where)
    fill = np.nan if dtype is np.float32 else -1
    table = np.full((len(where), n_sites, width, *values.shape[2:]), fill, dtype=dtype)
    start = 0
    for n, w in enumerate(where):
        table[n, :, : len(w)] = values[:, start : start + len(w)]
        start += len(w)
    return table


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


def _provenance(
    model: Model,
    sites: Sequence[Site],
    lens: Lens,
    top_k: int,
    filtered: bool,
    backend: str,
    batch_tokens: int | None,
) -> dict[str, Any]:
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
        "settings": {
            "top_k": top_k,
            "vocabulary_filter": filtered,
            "backend": backend,
            "batch_tokens": batch_tokens,
            "seed": torch.initial_seed(),
        },
        "versions": {
            **{name: version(name) for name in ("logitlab", "torch", "transformers", "numpy")},
            "python": platform.python_version(),
        },
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
