"""What a reading is made with, and how rows of hidden states become part of one."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from logitlab.errors import InputError, ModelError, VerificationError
from logitlab.lenses.base import Lens, OwnColumns
from logitlab.lenses.logit import LogitLens
from logitlab.logits import Asked, Head, LogitSource, Statistics
from logitlab.logits.choose import check_max_error, check_precision
from logitlab.models.capture import Activations, by_tokens
from logitlab.models.encoder import concept_labels
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded, whole_number
from logitlab.models.interfere import described as interventions
from logitlab.models.patches import token_patches
from logitlab.models.sites import Site
from logitlab.models.verify import finite_size, tolerance
from logitlab.models.vocabulary import ColumnLabels, Vocabulary
from logitlab.reading import Array, Prompt, Reading, Target
from logitlab.states import pictures_of
from logitlab.targets import VocabularyFilter, allowed_columns, resolve_targets

DECODE_ROWS = 2048
"""Rows whose head inputs are held at once: twice what the native backend works on together."""

GPU_DECODE_ROWS = 8192
"""The same where the head is on a GPU, which few rows leave idle."""

STATISTICS = ("entropy", "kl")
"""Statistics that can be left out of a reading."""


@dataclass(frozen=True)
class Plan:
    """What a reading is made with: everything but the hidden states.

    Attributes:
        model: the model.
        sites: the sites, in order of depth, the last one always among them.
        lens: the lens.
        columns: what the columns of the output are called.
        own: whether those are the lens' own, and not the model's.
        targets: the targets.
        asked: which statistics.
        source: what decodes the rows that the tail has prepared.
        settings: part of the provenance, filled up while reading.
        provenance: how the reading came about.
    """

    model: Model
    sites: list[Site]
    lens: Lens
    columns: Vocabulary
    own: bool
    targets: list[Target]
    asked: Asked
    source: Head | LogitSource
    settings: dict[str, Any]
    provenance: dict[str, Any]

    def decoded(
        self, activations: Activations, targets: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, Statistics]]:
        """Statistics [sites, rows] of all sites against the last one, for a few rows of a pass at a time.

        ``targets``: for each row targets of its own, [rows, m], in place of those that were asked for.
        """
        return _decoded(self.model, activations, self.lens, self.asked, self.source, targets)

    def reading(self, prompts: Sequence[Prompt], arrays: dict[str, Array], *, tokens: bool = True) -> Reading:
        """The reading of arrays [prompts, sites, positions, ...]; ``tokens``: whether the prompts are made of these."""
        _note_bound(self.settings, arrays, self.asked.max_error)
        return Reading(
            prompts=tuple(prompts),
            sites=tuple(map(str, self.sites)),
            targets=tuple(self.targets),
            labels=_labels(self.columns, arrays, self.targets),
            arrays=arrays,
            provenance=self.provenance,
            completions=_completions(self.model, prompts, arrays["top_id"]) if tokens and not self.own else {},
        )


def plan_of(
    model: Model,
    prompts: Sequence[Encoded],
    *,
    lens: Lens | None,
    sites: str | Site | Iterable[str | Site] | None,
    target: str | int | Sequence[str | int] | None,
    top_k: int,
    statistics: str | Iterable[str],
    vocabulary: VocabularyFilter | None,
    precision: str,
    max_error: float,
    backend: str,
    concepts: Sequence[Any] | None = None,
    batch_tokens: int | None = None,
) -> Plan:
    """Check the arguments of `read`, and say what they come to.

    Raises:
        InputError: one of them cannot be used.
    """
    top_k = whole_number(top_k, "top_k")
    chosen = model.select_sites(sites)
    if model.last_site not in chosen:
        chosen = sorted([*chosen, model.last_site], key=lambda s: s.order)
    lens = LogitLens() if lens is None else lens
    lens.check(model, chosen)
    own = lens if isinstance(lens, OwnColumns) else None
    if own is not None and not by_tokens(model, prompts):
        raise InputError(f"a {lens.name} reads tokens, and {model.name} does not answer token by token")
    columns: Vocabulary = model.columns if own is None else own.columns
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
    if own is not None:
        provenance["space"] = {"name": "concepts", "per": "position", "activation": "softmax"}
    source = model.tail.source if own is None else own.source(model)
    return Plan(model, chosen, lens, columns, own is not None, targets, asked, source, settings, provenance)


def prompt_of(model: Model, prompt: Encoded, positions: Sequence[int]) -> Prompt:
    """A prompt as a reading has it: with labels of its tokens."""
    labels = model.vocabulary.labels(prompt.ids)
    grids = token_patches(model.module, model.processor, prompt.ids, prompt.extra) if prompt.extra else []
    for _, patches in grids:
        for position, row, column in patches:
            labels[position] = f"patch {row},{column}"
    pictures = pictures_of(model, prompt, grids, prompt.extra.get("pixel_values")) if prompt.extra else ()
    return Prompt(prompt.text, prompt.ids, tuple(labels), tuple(positions), pictures)


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


def _completions(model: Model, prompts: Sequence[Prompt], top: Array) -> dict[tuple[int, int], dict[int, str]]:
    """Labels of predicted tokens that finish a character which the prompt has begun."""
    found: dict[tuple[int, int], dict[int, str]] = {}
    for n, prompt in enumerate(prompts):
        for slot, position in enumerate(prompt.positions):
            pending = model.vocabulary.pending(prompt.ids[: position + 1])
            if not pending:
                continue
            ids = [int(i) for i in np.unique(top[n, :, slot])]
            labels = {i: text for i in ids if (text := model.vocabulary.completed(pending, i)) is not None}
            if labels:
                found[n, slot] = labels
    return found


def check_finite(activations: Activations, owners: Sequence[Sequence[int]]) -> None:
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


def check_answers(model: Model, activations: Activations, owners: Sequence[Sequence[int]]) -> None:
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


def _decoded(
    model: Model,
    activations: Activations,
    lens: Lens,
    asked: Asked,
    source: Head | LogitSource,
    targets: torch.Tensor | None,
) -> Iterator[tuple[slice, Statistics]]:
    """Statistics [sites, rows] of all sites against the last one, for a few rows of a pass at a time."""
    sites = activations.sites
    n_rows = sum(len(p) for p in activations.positions)
    most = GPU_DECODE_ROWS if isinstance(source, Head) and source.weight.device.type == "cuda" else DECODE_ROWS
    wide = max(1, most // max(1, min(len(sites), 64)))
    wide = wide // 32 * 32 or wide  # whole panels of the native backend
    tall = max(1, most // min(wide, n_rows))
    for start in range(0, n_rows, wide):
        rows = slice(start, min(start + wide, n_rows))
        part = _rows_of(activations, rows)
        wanted = asked if targets is None else replace(asked, targets=targets[rows])
        final = model.tail.prepare(_final_states(part, model)) if asked.kl else None
        stacked: list[Statistics] = []
        for i in range(0, len(sites), tall):
            group = sites[i : i + tall]
            hidden = part.stacked(group)
            hidden = _transported(hidden, group, lens)
            x = model.tail.prepare(hidden.reshape(-1, hidden.shape[-1]))
            x = x.reshape(len(group), -1, x.shape[-1])
            del hidden  # not needed while the head is gone through
            stacked.append(wanted.of(x, source, None if final is None else final.to(x.device)))
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
        **({"interventions": changes} if (changes := interventions(model.module)) else {}),
        "settings": settings,
        "versions": dict(_versions()),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
