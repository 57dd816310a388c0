"""The main job: run a model, decode its hidden states through a lens, tabulate what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from logitlab.errors import InputError
from logitlab.lenses.base import Lens
from logitlab.logits import LogitSource, Statistics, statistics
from logitlab.logits.choose import check_precision, choose
from logitlab.logits.independent import independent
from logitlab.logits.statistics import MAX_ERROR
from logitlab.models.capture import activations_of, by_tokens, keys_of, select_positions
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded
from logitlab.models.passes import PASS_TOKENS, Part, joined, parts
from logitlab.models.sites import Site
from logitlab.plan import STATISTICS, Plan, check_answers, check_finite, plan_of, prompt_of
from logitlab.reading import Prompt, Reading
from logitlab.states import StateReading, check_concepts, read_states
from logitlab.table import Table
from logitlab.targets import VocabularyFilter

GROUP_POSITIONS = 512
"""Positions of short prompts that are decoded together."""


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
    plan = plan_of(
        model,
        prompts,
        lens=lens,
        sites=sites,
        target=target,
        top_k=top_k,
        statistics=statistics,
        vocabulary=vocabulary,
        concepts=concepts,
        precision=precision,
        max_error=max_error,
        backend=backend,
        batch_tokens=batch_tokens,
    )
    chosen, asked, lens, settings = plan.sites, plan.asked, plan.lens, plan.settings
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
        return _reading_of_states(prompts, found, plan)
    settings["backend"] = choose(backend, plan.source)
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
            for rows, result in plan.decoded(activations_of(model, part, prompts, chosen)):
                table.put(part, rows, result)
                if progress is not None:
                    progress(table.done * len(chosen), table.total * len(chosen))
        del part  # so that it can be freed while the next pass is run
    settings["pass_tokens"] = PASS_TOKENS if any(cut.values()) else None
    settings["share_prefixes"] = any(shared.values())
    return plan.reading([prompt_of(model, p, w) for p, w in zip(prompts, where, strict=True)], table.arrays)


def _reading_of_states(prompts: Sequence[Encoded], found: Sequence[StateReading], plan: Plan) -> Reading:
    where = [r.positions for r in found]
    table = Table(where, len(plan.sites))
    for n, one in enumerate(found):
        table.put_prompt(n, one.statistics, one.boxes)
    shown = [Prompt(p.text, p.ids, r.tokens, r.positions, r.pictures) for p, r in zip(prompts, found, strict=True)]
    return plan.reading(shown, table.arrays, tokens=False)


def _checked(model: Model, passes: Iterable[Part], prompts: Sequence[Encoded], sites: Sequence[Site]) -> Iterator[Part]:
    """Parts whose states are finite and whose last ones the model goes on from as the tail does."""
    for part in passes:
        activations = activations_of(model, part, prompts, sites)
        check_finite(activations, part.owners)
        with model.exclusive():
            check_answers(model, activations, part.owners)
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
