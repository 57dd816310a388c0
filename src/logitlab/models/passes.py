"""How prompts go through a model: together, alone, in pieces, or with what they share run once.

A pass leaves a `Part`: the wanted rows of its tokens. Long prompts are cut into passes of at most
`PASS_TOKENS` tokens that hand on the model's own cache, so that what one pass keeps in memory is bounded.
Prompts that begin alike can have their common tokens run once. Both need a model that goes on from its
cache as it would have gone on without a break; that is proved on the tokens at hand before it is relied on.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from logitlab.errors import InputError, LogitlabError, ModelError, OutOfMemoryError
from logitlab.models.handle import Continuation, Model
from logitlab.models.hooks import FORWARD_ERRORS, StopForward, Taps, hidden_input
from logitlab.models.inputs import Encoded
from logitlab.models.interfere import active
from logitlab.models.output import configs_of, output_of
from logitlab.models.verify import finite_size, max_difference, tolerance
from logitlab.models.watch import Key, watch

PASS_TOKENS = 512
"""Most tokens of one pass, where a model can go on from its cache."""

SHARED_TOKENS = 32
"""Fewest common tokens that are worth a pass of their own."""

Cache = Mapping[str, Any]
"""What a pass hands on to the next one: arguments of the model's forward pass."""


@dataclass(frozen=True)
class Part:
    """What one pass has left.

    Attributes:
        owners: for each sequence of the pass, the prompts that its tokens belong to.
        positions: for each sequence, the positions of those prompts that were kept.
        kept: by layer and kind, rows [kept positions, size], one sequence after the other.
        answers: what the model went on with at the last kept position of each sequence that has one; None
            where that has another form.
        continued: whether it is a piece of prompts, with what came before it in the model's cache.
        shared: whether other prompts have gone on from the same beginning.
    """

    owners: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    kept: dict[Key, torch.Tensor]
    answers: torch.Tensor | None
    continued: bool = False
    shared: bool = False

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(map(len, self.positions))


def joined(some: Sequence[Part]) -> Part:
    """Several parts as one, their rows one after the other; the answers are not kept."""
    kept = (
        {key: torch.cat([part.kept[key] for part in some]) for key in some[0].kept} if len(some) > 1 else some[0].kept
    )
    owners = tuple(o for part in some for o in part.owners)
    continued, shared = any(part.continued for part in some), any(part.shared for part in some)
    return Part(owners, tuple(p for part in some for p in part.positions), kept, None, continued, shared)


def shares(model: Model) -> bool:
    """Whether tokens that prompts begin with in common are run once unless the caller says otherwise.

    Sums of other shapes round differently. In float32 nothing of that is seen in a reading; in half precision it
    is, and a prompt's numbers would depend on its company.
    """
    return model.dtype in (torch.float32, torch.float64)


def parts(
    model: Model,
    prompts: Sequence[Encoded],
    keys: Sequence[Key],
    positions: Sequence[Sequence[int]],
    *,
    batch_tokens: int | None = None,
    share: bool | None = None,
) -> Iterator[Part]:
    """Run prompts and yield what each pass leaves at the wanted sites and positions.

    If a model is found to depend on more than its cache half-way through a prompt, that prompt is run again as a
    whole: what is yielded last for a position is what counts.

    Args:
        model: the model.
        prompts: the prompts.
        keys: layers and kinds of the sites.
        positions: for each prompt, the positions to keep.
        batch_tokens: put several prompts into padded passes of at most this many tokens; nothing is shared then.
        share: whether tokens that several prompts begin with are run once; by default as `shares` says.

    Raises:
        InputError: ``batch_tokens`` is not a number from 1 on, or is to be used together with sharing, or the model
            does not run on an input.
        ModelError: a site was not reached.
        OutOfMemoryError: there is not enough memory for a pass.
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    together = batch_tokens is not None and batch_tokens > 1
    if together and share:
        raise InputError("batch_tokens and share_prefixes exclude each other: prompts in one padded pass share nothing")
    share = (shares(model) if share is None else share) and not together
    together = together and model.stack.batch_first
    plain = [n for n, p in enumerate(prompts) if not p.extra and p.encoder_ids is None and p.ids]
    if together:
        plain = [n for n in plain if len(prompts[n].ids) > PASS_TOKENS]
    done: set[int] = set()
    for run in _runs({n: prompts[n].ids for n in plain}, share=share):
        whole = not run.after and len(run.ids) <= PASS_TOKENS
        if not whole and not continues(model, max((prompts[n] for n in run.owners), key=lambda p: len(p.ids))):
            continue
        done |= set(run.owners)
        if whole:
            yield _whole(model, prompts, run.owners, keys, positions)
            continue
        changed: list[int] = []
        yield from _continued(model, prompts, keys, positions, run, changed)
        for owners in _equal(prompts, changed):
            yield _whole(model, prompts, owners, keys, positions)
    rest = _equal(prompts, [n for n in range(len(prompts)) if n not in done])
    most = (batch_tokens or 1) if together else 1
    for batch in _batches([prompts[owners[0]] for owners in rest], most, padded=model.takes("attention_mask")):
        owners = tuple(rest[i] for i in batch)
        chosen = [_wanted(positions, some) for some in owners]
        found = _forward(model, [prompts[some[0]] for some in owners], keys, chosen)
        yield Part(owners, tuple(map(tuple, chosen)), found.kept, found.answers)


def _equal(prompts: Sequence[Encoded], numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """Groups of prompts that consist of the same tokens and nothing else, in the order of their first ones."""
    groups: dict[Any, list[int]] = {}
    for n in numbers:
        p = prompts[n]
        groups.setdefault(n if p.extra or not p.ids else (p.ids, p.encoder_ids), []).append(n)
    return [tuple(group) for group in groups.values()]


def _whole(
    model: Model,
    prompts: Sequence[Encoded],
    owners: tuple[int, ...],
    keys: Sequence[Key],
    positions: Sequence[Sequence[int]],
) -> Part:
    """One pass over a prompt, for all that are equal to it."""
    wanted = _wanted(positions, owners)
    found = _forward(model, [prompts[owners[0]]], keys, [wanted])
    if 4 * len(prompts[owners[0]].ids) >= PASS_TOKENS:
        _trim()
    return Part((owners,), (tuple(wanted),), found.kept, found.answers)


def _wanted(positions: Sequence[Sequence[int]], owners: Sequence[int]) -> list[int]:
    """Positions that any of some prompts wants."""
    if len(owners) == 1:
        return list(positions[owners[0]])
    return sorted({p for n in owners for p in positions[n]})


# -- prompts that begin alike ------------------------------------------------------------------


@dataclass
class Run:
    """Tokens that some prompts have in common, and what comes after them.

    Attributes:
        owners: the prompts.
        ids: the tokens, from where the run before it ends.
        after: the runs that go on from here.
    """

    owners: tuple[int, ...]
    ids: tuple[int, ...]
    after: list[Run] = field(default_factory=list["Run"])


Item = tuple[tuple[int, ...], list[int]]
"""Token ids, and the prompts that consist of them."""


def _runs(prompts: Mapping[int, tuple[int, ...]], *, share: bool) -> list[Run]:
    """Prompts as trees of runs, in the order of their first prompts. Equal prompts are one run in any case."""
    by_ids: dict[tuple[int, ...], list[int]] = {}
    for n, ids in prompts.items():
        by_ids.setdefault(ids, []).append(n)
    found: list[Run] = []
    # Not by recursion: prompts that each go on for a token more make trees as deep as there are prompts.
    waiting: list[tuple[list[Item], int, list[Run]]] = []
    if share and by_ids:
        waiting.append((sorted(by_ids.items()), 0, found))
    else:
        found += [Run(tuple(owners), ids) for ids, owners in by_ids.items()]
    while waiting:
        items, start, out = waiting.pop()
        out += _split(items, start, out, waiting)
    for run in _all(found):
        run.after.sort(key=lambda r: r.owners)
    return sorted(found, key=lambda run: run.owners)


def _split(
    items: list[Item], start: int, out: list[Run], waiting: list[tuple[list[Item], int, list[Run]]]
) -> list[Run]:
    """Runs of sorted, distinct prompts that agree up to ``start``; what is to be split further is put to wait."""
    first, last = items[0][0], items[-1][0]
    if len(items) == 1:
        return [Run(tuple(items[0][1]), first[start:])]
    shorter = min(len(first), len(last))
    common = next((i for i in range(start, shorter) if first[i] != last[i]), shorter)
    groups: dict[int, list[Item]] = {}
    for item in items:
        if len(item[0]) > common:
            groups.setdefault(item[0][common], []).append(item)
    if common - start < SHARED_TOKENS:  # not worth a pass of its own
        waiting += [(group, start, out) for group in groups.values()]
        return [Run(tuple(owners), ids[start:]) for ids, owners in items if len(ids) == common]
    run = Run(tuple(sorted(n for _, some in items for n in some)), first[start:common])
    waiting += [(group, common, run.after) for group in groups.values()]
    return [run]


def _all(runs: Sequence[Run]) -> Iterator[Run]:
    """Every run of some trees, each before those that go on from it."""
    waiting = list(runs)
    while waiting:
        run = waiting.pop()
        waiting += run.after
        yield run


def _continued(
    model: Model,
    prompts: Sequence[Encoded],
    keys: Sequence[Key],
    positions: Sequence[Sequence[int]],
    root: Run,
    changed: list[int],
) -> Iterator[Part]:
    """Run a tree, handing on the cache; prompts that cannot be trusted in the end are put into ``changed``."""
    before = _buffers(model)
    # What is run next comes last: a run, the cache that it goes on from, tokens so far, whether others go on from it.
    waiting: list[tuple[Run, Cache | None, int, bool]] = [(root, None, 0, False)]
    while waiting:
        run, cache, past, shared = waiting.pop()
        stop = past + len(run.ids)
        pieces = math.ceil(len(run.ids) / PASS_TOKENS)
        size = math.ceil(len(run.ids) / pieces)
        everything = _wanted(positions, run.owners)
        needed = max(everything, default=-1)
        for start in range(past, stop, size):
            end = min(start + size, stop)
            if start > needed:  # a model that goes on from its cache does not look ahead
                break
            wanted = [p for p in everything if start <= p < end]
            more = end < min(stop, needed + 1) or (bool(run.after) and needed >= stop)
            piece = Encoded(None, prompts[run.owners[0]].ids[start:end])
            rows = [[p - start for p in wanted]]
            try:
                cache = deepcopy(cache) if shared and start == past else cache
                found = _forward(model, [piece], keys if wanted else [], rows, cache, start, more=more)
            except (InputError, MemoryError, *FORWARD_ERRORS) as error:
                if lacks_memory(error):
                    raise OutOfMemoryError(f"there is not enough memory for the cache of {model.name}") from error
                if start == 0:  # not because of a cache
                    raise
                found = None
            # Or what it goes on from is more than its cache: rotary tables that depend on the length, say.
            if found is None or _buffers(model) != before:
                with model.exclusive():
                    model.continuation = Continuation(_state(model), 0)
                changed += root.owners
                return
            cache = found.cache
            part = Part((run.owners,), (tuple(wanted),), found.kept, found.answers, True, bool(root.after))
            del found  # what is not held here can be freed while the next piece is run
            _trim()
            if wanted:
                yield part
            del part
        if needed >= stop:
            last = len(run.after) - 1  # it may have the cache itself, since it is run last
            waiting += reversed([(after, cache, stop, i < last) for i, after in enumerate(run.after)])


def _trim() -> None:
    """Give freed memory back to the system, where the C library can: passes and caches leave holes of every size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _buffers(model: Model) -> list[tuple[int, int]]:
    """What tells whether a buffer has been changed or exchanged (rotary tables that depend on the length)."""
    return [(b.data_ptr(), 0 if b.is_inference() else b._version) for b in model.module.buffers() if b.numel()]


# -- proof that a model goes on from its cache -------------------------------------------------


def continues(model: Model, prompt: Encoded) -> bool:
    """Whether passes over parts of a prompt give what one pass over all of it gives.

    It is proved for a length, and again when the model has changed: its weights, its hooks, its kind of attention.
    """
    if model.encoder_decoder or not model.takes("use_cache") or model.stack.batch != 1:
        return False
    if active(model.module):
        return False  # what is done to a token can depend on those after it (the last one of a prompt, say)
    if any(p.device.type == "meta" for p in model.module.parameters()):
        return False  # weights on disk are read for every pass: the fewer the better
    if any(most < len(prompt.ids) for most in _numbers(model, ("index_topk",))):
        return False  # which keys are looked at is decided by comparisons, whose outcome rounding can turn
    with model.exclusive():  # or hooks of another thread's pass are taken for somebody's
        state = _state(model)
    needed = _tokens_of_proof(_numbers(model, ("window", "chunk")), len(prompt.ids))
    known = model.continuation
    if known is None or known.state != state or 0 < known.tokens < needed:
        fine = _proved(model, prompt.ids[:needed])
        with model.exclusive():
            known = model.continuation = Continuation(_state(model), needed if fine else 0)
    return known.tokens > 0


def cache_of(model: Model, prompts: Sequence[Encoded]) -> Cache:
    """What a model that goes on from its cache (`continues`) hands on after some tokens of equal length."""
    cache = _forward(model, prompts, [], [()] * len(prompts), more=True).cache
    assert cache is not None
    return cache


def _tokens_of_proof(windows: Sequence[int], length: int) -> int:
    """How many tokens show what a prompt of some length can show: beyond every window, pieces longer than it too."""
    window = max((w for w in windows if w < length), default=0)
    beyond = 2 * window if window < PASS_TOKENS else window
    return min(length, max(2 * SHARED_TOKENS, beyond) + SHARED_TOKENS)


def _numbers(model: Model, words: Sequence[str]) -> list[int]:
    """Numbers above 0 that the configuration has under names with one of some words in them.

    For ``window`` and ``chunk`` that is how far, in tokens, the model looks back: beyond it behaves differently.
    """
    found: list[int] = []
    for config in configs_of(getattr(model.module, "config", None)):
        for name, value in vars(config).items():
            if any(word in name for word in words):
                values: Any = value if isinstance(value, list | tuple) else [value]
                found += [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0]
    return found


def _state(model: Model) -> int:
    """A number that changes when something does that the result of a pass can depend on, apart from its input."""
    found: list[Any] = [getattr(getattr(model.module, "config", None), "_attn_implementation", None)]
    for p in model.module.parameters():
        found.append((p.data_ptr(), 0 if p.is_inference() else p._version))
    for module in model.module.modules():
        found += [*module._forward_hooks, *module._forward_pre_hooks]  # pyright: ignore[reportPrivateUsage]
        for name, value in vars(module).items():  # what a module remembers from one pass to the next
            if isinstance(value, torch.Tensor):
                small = value.numel() <= 64 and value.device.type != "meta"  # made anew in every pass, say
                version = 0 if value.is_inference() else value._version
                found.append((name, tuple(value.flatten().tolist()) if small else (value.data_ptr(), version)))
    return hash(tuple(found))


def _proved(model: Model, ids: tuple[int, ...]) -> bool:
    """Hold passes that hand on a cache, and on copies of it, against one pass, in what the model answers."""
    key = (model.last_site.layer, model.last_site.kind)
    cuts = [0, len(ids) // 2 - 1, len(ids) - 2, len(ids)]
    watched = sorted({0, cuts[1] - 1, cuts[1], cuts[1] + 1, cuts[2] - 1, cuts[2], len(ids) - 1})
    try:
        whole = _forward(model, [Encoded(None, ids)], [key], [watched]).kept[key]
        pieces: list[torch.Tensor] = []
        again: list[torch.Tensor] = []
        cache: Cache | None = None
        for start, end in pairwise(cuts):
            here = [p - start for p in watched if start <= p < end]
            piece = Encoded(None, ids[start:end])
            more = end < len(ids)
            if cache is not None:  # a copy first: if it is not one, the cache itself is spoilt
                again.append(_forward(model, [piece], [key], [here], deepcopy(cache), start, more=more).kept[key])
            found = _forward(model, [piece], [key], [here], cache, start, more=more)
            cache = found.cache
            pieces.append(found.kept[key])
        with model.exclusive():
            truth, ours = model.tail.logits(whole), model.tail.logits(torch.cat(pieces))
            copied = model.tail.logits(torch.cat(again))
    except (InputError, MemoryError, *FORWARD_ERRORS) as error:
        if lacks_memory(error):  # that says nothing about the model
            raise OutOfMemoryError(f"there is not enough memory for the cache of {model.name}") from error
        return False
    size = finite_size(truth)
    # Both round, all the way up the stack, in sums of other shapes: more than a tail does, much less than a fault.
    allowed = 64 * tolerance(torch.float32, size) + 2 * tolerance(model.dtype, size)
    return max_difference(ours, truth) <= allowed and max_difference(copied, truth[-len(copied) :]) <= allowed


# -- one pass ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    kept: dict[Key, torch.Tensor]
    answers: torch.Tensor | None
    cache: Cache | None


def _forward(
    model: Model,
    prompts: Sequence[Encoded],
    keys: Sequence[Key],
    positions: Sequence[Sequence[int]],
    cache: Cache | None = None,
    past: int = 0,
    *,
    more: bool = False,
) -> _Found:
    """One forward pass; the wanted rows of every key, [rows, size]. Stops before the head if it can.

    Args:
        model: the model.
        prompts: what is run.
        keys: what is kept.
        positions: of each prompt, which rows.
        cache: what an earlier pass has handed on.
        past: how many tokens that was.
        more: whether another pass will go on from this one: then the cache is handed on.

    Returns:
        The rows, and what the model went on with at the last wanted position of each prompt, [prompts, size], or
        None where that has another form.
    """
    batch_index = torch.tensor([b for b, p in enumerate(positions) for _ in p], dtype=torch.long)
    token_index = torch.tensor([t for p in positions for t in p], dtype=torch.long)
    found: dict[Key, torch.Tensor] = {}
    width = max(len(p.ids) for p in prompts)
    layout = model.stack.layout

    def keep(key: Key, value: torch.Tensor, scale: float = 1.0) -> None:
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

    head = model.tail.head_module
    went_on: list[torch.Tensor | None] = []
    handed: dict[str, Any] | None = None
    with model.exclusive(), Taps() as taps:
        watch(model, keys, keep, taps)

        def stop(*args: Any, **kwargs: Any) -> torch.Tensor:
            given = hidden_input(args, kwargs)
            went_on.append(given)
            if more and given is not None:  # the model has to come to its end to give its cache
                return given[..., :1]
            raise StopForward

        if head is not None:
            taps.replace(head, stop)
        inputs = arguments_of(model, prompts, past)
        if cache is not None or more:
            inputs |= {"use_cache": True, **(cache or {})}
        try:
            with suppress(StopForward), torch.no_grad():
                result = model.module(**inputs)
                if more:
                    handed = _handed_on(model, result)
                if head is None:
                    output = output_of(result)
                    went_on.append(None if output is None else output.logits)
        except LogitlabError:
            raise
        except Exception as error:  # a model's own code can raise anything
            raise stopped(model, inputs, error) from error
    missing = [key for key in keys if key not in found]
    if missing:
        raise ModelError(f"layer {missing[0][0]} was not reached for these inputs (its {missing[0][1]} was not seen)")
    given = went_on[-1] if went_on else None
    if given is None or given.numel() != len(prompts) * width * given.shape[-1] or not all(positions):
        return _Found(found, None, handed)
    last = torch.tensor([p[-1] for p in positions], device=given.device)
    rows = given.detach().reshape(len(prompts), width, -1)
    return _Found(found, rows[torch.arange(len(prompts), device=given.device), last], handed)


def _handed_on(model: Model, result: Any) -> dict[str, Any]:
    """What a pass gives that the model's forward pass also takes: its cache, under whatever name."""
    pairs: Any = result.items() if hasattr(result, "items") else ()
    found = {name: value for name, value in pairs if value is not None and model.takes(name) and name != "logits"}
    if not found:
        raise ModelError(f"{model.name} returned no cache")
    return found


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that there is not enough memory; not all of them have a type of their own."""
    text = str(error).lower()
    typed = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return typed or (isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text))


def stopped(model: Model, inputs: Mapping[str, Any], error: Exception) -> LogitlabError:
    """What to raise when a model's own code refuses an input."""
    sizes = ", ".join(f"{k} {list(v.shape)}" for k, v in inputs.items() if isinstance(v, torch.Tensor))
    why = " ".join(str(error).split())[:300]
    if lacks_memory(error):
        return OutOfMemoryError(
            f"there is not enough memory to run {model.name} on this input ({sizes}): give a shorter one, or load the "
            f"model in half precision ({why[:120]})"
        )
    return InputError(f"{model.name} does not run on this input ({sizes}): {type(error).__name__}: {why}")


# -- batches and arguments ---------------------------------------------------------------------


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


def arguments_of(model: Model, prompts: Sequence[Encoded], past: int = 0) -> dict[str, Any]:
    """Keyword arguments of the forward pass; padding is always on the right.

    With padding on the right every token keeps its own position number, whatever the tokenizer's
    habit, and nothing that comes before it changes. ``past`` is the number of tokens that a cache stands for.
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
        before = torch.ones((len(prompts), past), dtype=mask.dtype, device=mask.device)
        arguments["attention_mask"] = torch.cat([before, mask], dim=1) if past else mask
    return arguments


def _padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)
