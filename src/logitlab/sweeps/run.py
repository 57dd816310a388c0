"""Sweep a corpus: cut it into shards, have them done here or on a cluster, add up what they give."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from logitlab.corpora import Corpus, corpus
from logitlab.errors import InputError
from logitlab.files import difference, locked, write_text
from logitlab.lenses.base import Lens
from logitlab.lenses.logit import LogitLens
from logitlab.models.capture import capture_encoded
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded, whole_number
from logitlab.models.sites import Site
from logitlab.sweeps.job import Job, Shard, Shards, Worker, check_model, keep, kept, rows_file, sums_file
from logitlab.sweeps.report import SweepReport
from logitlab.sweeps.sums import Sums

MANIFEST, LOCK = "sweep.json", "sweep.lock"

OURS = re.compile(r"sweep\.(json|lock)|report\.json|(shard|rows)-\d+\.\w+|\..*\.part")
"""Names of files in the folder of a sweep."""

MOST_GROUPS = 2000
"""Groups that are told apart at most: each has sums of its own in memory."""

BLOCK = 256
"""Shards that a cluster is given at a time."""


@dataclass(frozen=True)
class Progress:
    """Where a sweep stands.

    Attributes:
        shards: shards done, those of an earlier run among them.
        tokens: tokens done, those of an earlier run among them.
        rate: tokens a second in this run.
        left: seconds that are left, if it is known how many tokens there are.
    """

    shards: int
    tokens: int
    rate: float
    left: float | None


def sweep(
    model: Model,
    source: Any,
    *,
    lens: Lens | Sequence[Lens] | Mapping[str, Lens] | None = None,
    sites: str | Site | Iterable[str | Site] | None = None,
    top_k: int = 5,
    length: int = 256,
    packed: bool | None = None,
    column: str = "text",
    group: str | None = None,
    skip_first: int = 0,
    max_tokens: int | None = None,
    batch_tokens: int = 1024,
    shard_windows: int = 16,
    precision: str = "exact",
    folder: str | Path | None = None,
    rows: bool = False,
    ray: str | None = None,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> SweepReport:
    """Measure, over a corpus, what lenses say at every site, beside what the model says in the end.

    Memory does not grow with the number of texts. With a folder the sweep goes on where it was broken off, however that
    happened, and ends with the same bytes as one that was not.

    Args:
        model: the model.
        source: the corpus, in any form that `logitlab.corpora.corpus` takes.
        lens: a lens, several, or a mapping of names to lenses; by default the logit lens.
        sites: which sites, as in `logitlab.read`; the output of the last block is always among them.
        top_k: how many top tokens are compared with the model's.
        length: tokens of a window.
        packed: put texts one after the other into full windows, or give each text windows of its own. By default
            packed, unless tokens are grouped.
        column: which column of a table is the text.
        group: a column by whose values tokens are grouped as well (language, label).
        skip_first: tokens at the beginning of each window that are left out.
        max_tokens: stop after about so many tokens.
        batch_tokens: most tokens of one pass of the model.
        shard_windows: windows of a shard, which is the piece that can be lost.
        precision: as in `logitlab.read`.
        folder: where shards and the report are kept.
        rows: also write one row for each token, lens and site, as Parquet, shard by shard; needs a folder.
        ray: address of a Ray cluster that does the shards (``"auto"``, ``"local"``, ``host:port``, ``ray://host:port``);
            its workers must see the folder. Needs ``logitlab[scale]``.
        workers: how many workers the cluster runs, each with a model of its own; by default one a node.
        progress: called after each shard.

    Returns:
        The report; it is also in the folder.

    Raises:
        InputError: an argument or the corpus cannot be used, or the folder holds another sweep.
        ModelError: hidden states are not finite.

    Example:
        ``sweep(model, "texts.jsonl", folder="out").measure("kl", site="12.resid_post").mean``
    """
    numbers = {"top_k": top_k, "length": length, "batch_tokens": batch_tokens, "shard_windows": shard_windows}
    numbers |= {name: n for name, n in (("max_tokens", max_tokens), ("workers", workers)) if n is not None}
    for name, value in numbers.items():
        if whole_number(value, name) < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if whole_number(skip_first, "skip_first") < 0:
        raise InputError(f"skip_first is {skip_first}; it must be at least 0")
    if workers is not None and ray is None:
        raise InputError("workers are those of a Ray cluster: give its address as ray=, or leave workers out")
    if packed and group is not None:
        raise InputError("texts that are packed share windows and cannot be grouped: leave packed or group out")
    if folder is None and (rows or ray is not None):
        raise InputError(f"{'rows' if rows else 'what a cluster does'} must be written somewhere: name a folder")
    check_model(model)
    lenses = _named(lens)
    chosen = model.select_sites(sites)
    if model.last_site not in chosen:
        chosen = sorted([*chosen, model.last_site], key=lambda s: s.order)
    packed = group is None if packed is None else packed
    job = Job(
        sites=tuple(map(str, chosen)),
        top_k=top_k,
        length=length,
        packed=packed,
        group=group,
        skip_first=skip_first,
        shard_windows=shard_windows,
        batch_tokens=batch_tokens,
        precision=precision,
        rows=rows,
        max_tokens=max_tokens,
        next_token=model.space.name == "vocabulary" and looks_back_only(model),
    )
    worker = Worker(model, lenses, job)
    texts = corpus(source, column=column)
    shards = Shards(model, texts, job)
    with ExitStack() as held:
        place = None if folder is None else _opened(Path(folder), worker, held)
        return _swept(worker, shards, texts, place, ray, workers, lenses, progress)


def _swept(
    worker: Worker,
    shards: Shards,
    texts: Corpus,
    place: Path | None,
    ray: str | None,
    workers: int | None,
    lenses: Mapping[str, Lens],
    progress: Callable[[Progress], None] | None,
) -> SweepReport:
    """The report of all shards, in their order."""
    job, model = worker.job, worker.model
    sums: dict[str, dict[str, Sums]] = {}
    count = tokens = 0
    watch = _Watch(job.max_tokens, progress)
    for shard, found in _done(worker, shards, place, ray, workers, lenses, watch):
        count, tokens = count + 1, tokens + shard.tokens
        for lens_name, groups in found.items():
            mine = sums.setdefault(lens_name, {})
            for name, one in groups.items():
                mine.setdefault(name, Sums.nothing(len(job.sites))).add(one)
            if len(mine) > MOST_GROUPS:
                raise InputError(
                    f"the column {job.group!r} has more than {MOST_GROUPS:,} values, and each has sums of its own: "
                    "group by a column with fewer"
                )
    if count == 0:
        raise InputError(
            f"the corpus {texts.name} gives no window of {job.length} tokens: {shards.windows.left_over} tokens are "
            f"left over, {shards.too_short} are in windows of no more than skip_first={job.skip_first}; give more "
            "text, a smaller length, or packed=False"
        )
    if place is not None and sums_file(place, count).is_file():
        raise InputError(
            f"{place} has more shards than the corpus gives now: it has changed since; give another folder"
        )
    about = {
        "model": {"name": model.name, "fingerprint": model.fingerprint, "stack": model.stack.name},
        **{name: value for name, value in worker.key.items() if name not in ("model", "stack")},
        "corpus": {
            "name": texts.name,
            "texts": shards.windows.texts,
            "tokens": tokens,
            "left over": shards.windows.left_over,
            "too short": shards.too_short,
        },
    }
    report = SweepReport(list(job.sites), sums, json.loads(json.dumps(about, default=str)))
    if place is not None:
        report.save(place)
    return report


def looks_back_only(model: Model) -> bool:
    """Whether a state depends on what came before it alone: then the model predicts the next token.

    It is tried: the last of some tokens is exchanged, and nothing before it may change.
    """
    size = min(model.input_vocab_size, 1000)
    ids = [(7 * i + 3) % size for i in range(9)]
    prompts = [Encoded(None, tuple(ids)), Encoded(None, (*ids[:-1], (ids[-1] + 1) % size))]
    last = model.last_site
    found = capture_encoded(model, prompts, [last], [list(range(8))] * 2, share=False)[last]
    return bool(torch.allclose(found[:8].float(), found[8:].float(), atol=1e-5, rtol=1e-4))


def _named(lens: Lens | Sequence[Lens] | Mapping[str, Lens] | None) -> dict[str, Lens]:
    if lens is None:
        return {"logit lens": LogitLens()}
    if isinstance(lens, str):
        raise InputError(f"lens is the text {lens!r}: give a lens, for instance load_lens({lens!r})")
    if isinstance(lens, Mapping):
        found = {str(name): one for name, one in lens.items()}
    else:
        some = list(lens) if isinstance(lens, Sequence) else [lens]
        found = {one.name: one for one in some}
        if len(found) < len(some):
            raise InputError("two lenses have the same name: give a mapping of names to lenses")
    if not found:
        raise InputError("no lens was given; leave lens out for the logit lens")
    return found


class _Watch:
    """Tells how far a sweep is."""

    def __init__(self, most: int | None, tell: Callable[[Progress], None] | None) -> None:
        self._most, self._tell = most, tell
        self._begin = time.perf_counter()
        self._shards = self._tokens = self._fresh = 0

    def done(self, shard: Shard, *, fresh: bool) -> None:
        """A shard is done; ``fresh``: in this run."""
        self._shards, self._tokens = self._shards + 1, self._tokens + shard.tokens
        self._fresh += shard.tokens if fresh else 0
        if self._tell is None:
            return
        rate = self._fresh / max(1e-9, time.perf_counter() - self._begin)
        left = max(0, self._most - self._tokens) / rate if self._most is not None and rate > 0 else None
        self._tell(Progress(self._shards, self._tokens, rate, left))


def _opened(folder: Path, worker: Worker, held: ExitStack) -> Path:
    """A folder for this sweep: a new one, or one that it was broken off in."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the sweep")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    manifest = folder / MANIFEST
    strange = [p for p in folder.iterdir() if not OURS.fullmatch(p.name)]
    if strange and not manifest.is_file():
        raise InputError(f"{folder} is not empty and holds no sweep that could go on; give a new folder")
    held.enter_context(locked(folder / LOCK, "sweep"))
    key = json.loads(json.dumps(worker.key, default=str))
    if manifest.is_file():
        try:
            its = json.loads(manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{manifest} cannot be read: {error}") from error
        its = its if isinstance(its, dict) else {}
        differing = [name for name in key if its.get(name) != key[name]]
        if differing:
            what = ", ".join(f"{name} ({difference(its.get(name), key[name])})" for name in differing)
            raise InputError(f"{folder} holds a sweep with another {what}: give another folder, or the same arguments")
    else:
        write_text(manifest, json.dumps(key, indent=1) + "\n")
    for unfinished in folder.glob(".*.part"):
        with suppress(OSError):
            unfinished.unlink()
    return folder


Found = tuple[Shard, dict[str, dict[str, Sums]]]


def _done(
    worker: Worker,
    shards: Shards,
    folder: Path | None,
    ray: str | None,
    workers: int | None,
    lenses: Mapping[str, Lens],
    watch: _Watch,
) -> Iterator[Found]:
    """All shards with their sums, in order; what is not there yet is done."""
    if ray is not None:
        assert folder is not None
        yield from _on_cluster(worker, shards, folder, ray, workers, lenses, watch)
        return
    for shard in shards:
        found = None if folder is None else _there(folder, worker, shard)
        fresh = found is None
        if found is None:
            found = worker.do(shard)[0] if folder is None else keep(folder, worker, shard)
        watch.done(shard, fresh=fresh)
        yield shard, found


def _there(folder: Path, worker: Worker, shard: Shard) -> dict[str, dict[str, Sums]] | None:
    """The sums of a shard that is on disk, whole."""
    found = kept(folder, shard.index, worker.run, shard.digest)
    return None if worker.job.rows and not rows_file(folder, shard.index).is_file() else found


def _on_cluster(
    worker: Worker,
    shards: Shards,
    folder: Path,
    address: str,
    workers: int | None,
    lenses: Mapping[str, Lens],
    watch: _Watch,
) -> Iterator[Found]:
    from logitlab.sweeps.cluster import Cluster

    with Cluster(address, worker.model, lenses, worker.job, folder, workers) as cluster:
        every = iter(shards)
        while block := list(islice(every, BLOCK)):
            missing = {s.index: s for s in block if _there(folder, worker, s) is None}
            for s in block:
                if s.index not in missing:
                    watch.done(s, fresh=False)
            for index in cluster.do(list(missing.values())):
                watch.done(missing[index], fresh=True)
            for shard in block:
                found = _there(folder, worker, shard)
                if found is None:
                    raise InputError(
                        f"a worker has done shard {shard.index}, and it is not in {folder}: all nodes of the cluster "
                        "must see that folder (a shared file system)"
                    )
                yield shard, found
