"""One shard of a sweep: some windows through a model and some lenses. Wherever it is done, it is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from logitlab.corpora import Corpus, Windows, windows
from logitlab.corpora.windows import Span
from logitlab.errors import InputError, ModelError
from logitlab.files import write_atomically
from logitlab.lenses.base import Lens, OwnColumns
from logitlab.logits import statistics
from logitlab.models.capture import Activations, activations_of, by_tokens, keys_of
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded
from logitlab.models.passes import Part, parts
from logitlab.plan import STATISTICS, Plan, check_answers, check_finite, plan_of
from logitlab.sweeps.report import ALL
from logitlab.sweeps.sums import Adder, Sums, Tokens, values_of


@dataclass(frozen=True)
class Job:
    """What decides the numbers of a sweep, beside the model, the lenses and the corpus.

    Attributes:
        sites: names of the sites, in order of depth.
        top_k: how many top tokens are compared.
        length: tokens of a window.
        packed: whether texts are packed into windows, or each has windows of its own.
        group: column of the corpus by which tokens are grouped as well.
        skip_first: tokens at the beginning of a window that are left out.
        shard_windows: windows of a shard.
        batch_tokens: most tokens of one pass.
        precision: of the statistics.
        rows: whether every token is written down.
        max_tokens: after how many tokens to stop; None for the whole corpus.
        next_token: whether the model's predictions are of the next token.
    """

    sites: tuple[str, ...]
    top_k: int
    length: int
    packed: bool
    group: str | None
    skip_first: int
    shard_windows: int
    batch_tokens: int
    precision: str
    rows: bool
    max_tokens: int | None
    next_token: bool

    def key(self, model: Model, lenses: Mapping[str, Lens]) -> dict[str, Any]:
        """What must be the same for results to belong together."""
        return {
            "model": model.fingerprint,
            "stack": model.stack.name,
            "lenses": {name: lens.describe() for name, lens in lenses.items()},
            "settings": {**asdict(self), "sites": list(self.sites)},
        }


def run_name(key: Mapping[str, Any]) -> str:
    """A short name of a run, which its shards carry."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Shard:
    """Some windows of a corpus.

    Attributes:
        index: number of the shard, from 0.
        ids: token ids of each window.
        own: for each window, first and last but one of the positions that are measured.
        spans: for each window, what its ids are, see `logitlab.corpora.Window`.
        groups: for each window its group, or None.
    """

    index: int
    ids: tuple[np.ndarray, ...]
    own: tuple[tuple[int, int], ...]
    spans: tuple[tuple[Span, ...], ...]
    groups: tuple[str | None, ...]

    @property
    def tokens(self) -> int:
        """Number of positions that are measured."""
        return sum(stop - start for start, stop in self.own)

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the windows."""
        found = hashlib.sha256(json.dumps([self.own, self.spans, self.groups]).encode())
        for ids in self.ids:
            found.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        return found.hexdigest()


class Shards:
    """Shards of a corpus, in order.

    Attributes:
        windows: the windows that they are made of.
        too_short: tokens of windows that are not longer than what is skipped.
    """

    def __init__(self, model: Model, corpus: Corpus, job: Job) -> None:
        self.windows: Windows = windows(model, corpus, job.length, packed=job.packed)
        self.too_short = 0
        self._job = job

    def __iter__(self) -> Iterator[Shard]:
        self.too_short = 0
        waiting: list[tuple[np.ndarray, tuple[int, int], tuple[Span, ...], str | None]] = []
        index = tokens = 0
        for window in self.windows:
            start = window.own.start + self._job.skip_first
            if start >= window.own.stop:
                self.too_short += window.own.stop - window.own.start
                continue
            group = None
            if self._job.group is not None:
                columns = window.source.columns
                if self._job.group not in columns:
                    has = ", ".join(map(str, columns)) or "none but the text"
                    raise InputError(f"{window.place} has no column {self._job.group!r} to group by; there are {has}")
                group = str(columns[self._job.group])
            ids = np.array(window.ids, dtype=np.int32)
            waiting.append((ids, (start, window.own.stop), window.spans, group))
            tokens += window.own.stop - start
            enough = self._job.max_tokens is not None and tokens >= self._job.max_tokens
            if len(waiting) == self._job.shard_windows or enough:
                yield _shard(index, waiting)
                index, waiting = index + 1, []
            if enough:
                return
        if waiting:
            yield _shard(index, waiting)


def _shard(index: int, waiting: Sequence[tuple[Any, ...]]) -> Shard:
    ids, own, spans, groups = zip(*waiting, strict=True)
    return Shard(index, ids, own, spans, groups)


def check_model(model: Model) -> None:
    """Raise `InputError` if a model cannot be swept over texts."""
    if not by_tokens(model, [Encoded(None, (0,))]) or model.encoder_decoder:
        raise InputError(f"{model.name} is not read token by token from texts alone: it cannot be swept over a corpus")


class Worker:
    """Does shards of one job with one model.

    Args:
        model: the model.
        lenses: lenses by name.
        job: the job.

    Raises:
        InputError: a lens has columns of its own, or cannot be used on this model.
    """

    def __init__(self, model: Model, lenses: Mapping[str, Lens], job: Job) -> None:
        self.model, self.job = model, job
        self.key = job.key(model, lenses)
        self.run = run_name(self.key)
        self.plans: dict[str, Plan] = {}
        prompt = Encoded(None, (0,))
        for name, lens in lenses.items():
            if isinstance(lens, OwnColumns):
                raise InputError(
                    f"a {lens.name} has columns of its own: it cannot be compared with the model over a corpus"
                )
            self.plans[name] = plan_of(
                model,
                [prompt],
                lens=lens,
                sites=list(job.sites),
                target=None,
                top_k=job.top_k,
                statistics=STATISTICS,
                vocabulary=None,
                precision=job.precision,
                max_error=1e-3,
                backend="auto",
            )
        self.sites = next(iter(self.plans.values())).sites
        self._stream = all(site.kind in ("resid_pre", "resid_post") for site in self.sites)
        self._keys = keys_of(model, self.sites)

    def do(self, shard: Shard) -> tuple[dict[str, dict[str, Sums]], dict[str, np.ndarray]]:
        """Sums by lens and group, and, if they are wanted, columns of what every token has given."""
        prompts = [Encoded(None, tuple(map(int, ids))) for ids in shard.ids]
        where = [list(range(*own)) for own in shard.own]
        tables = {name: _Tokens(shard, len(self.sites)) for name in self.plans}
        passes = parts(self.model, prompts, self._keys, where, batch_tokens=self.job.batch_tokens, share=False)
        for part in passes:
            activations = activations_of(self.model, part, prompts, self.sites)
            check_finite(activations, part.owners)
            with self.model.exclusive():
                check_answers(self.model, activations, part.owners)
                self._read(activations, part, shard, tables)
        every = list(range(len(prompts)))
        groups = {ALL: every}
        for n in every:
            group = shard.groups[n]
            if group is not None:
                groups.setdefault(f"{self.job.group}={group}", []).append(n)
        sums: dict[str, dict[str, Sums]] = {}
        for name, table in tables.items():
            adder = Adder(len(prompts), len(self.sites), stream=self._stream)
            adder.add(table.values, table.tokens(self._next(shard)))
            sums[name] = {group: adder.sums(of) for group, of in groups.items()}
        return sums, self._columns(shard, tables) if self.job.rows else {}

    def _read(self, activations: Activations, part: Part, shard: Shard, tables: Mapping[str, _Tokens]) -> None:
        """Put what the tokens of a pass give into the tables; a token that is run again counts as it was then."""
        places = [(row, n, p) for row, (owners, p) in enumerate(_rows(part)) for n in owners]
        row = torch.tensor([r for r, _, _ in places])
        slot = torch.tensor([tables[next(iter(tables))].slot(n, p) for _, n, p in places])
        following = torch.full((part.size,), -1)
        following[row] = self._next(shard)[slot]  # windows that are run as one are equal, and so is what follows
        last = self.model.last_site
        final = self.model.tail.prepare(activations.kept[last.layer, last.kind])
        top = statistics(final, self.model.tail.source, top_k=self.job.top_k, entropy=False).top_ids[0].cpu()
        tokens = Tokens(torch.zeros(part.size, dtype=torch.long), following, top)
        targets = tokens.targets() if self.job.next_token else None
        for name, plan in self.plans.items():
            for rows, found in plan.decoded(activations, targets):
                values = values_of(found, tokens.at(rows), next_token=self.job.next_token)
                self._check(name, values)
                mine = (row >= rows.start) & (row < rows.stop)
                where = row[mine] - rows.start
                tables[name].put(slot[mine], {k: v[:, where] for k, v in values.items()}, found.top_ids[:, where, 0])

    def _check(self, lens: str, values: Mapping[str, torch.Tensor]) -> None:
        """What is not a number would vanish in a mean."""
        for measure in ("kl", "entropy", "confidence"):
            bad = values[measure].isnan().any(1)
            if bool(bad.any()):
                site = self.sites[int(bad.nonzero()[0])]
                raise ModelError(
                    f"the {measure} is not a number at {site} through {lens}: look at the lens, or use float32"
                )

    def _next(self, shard: Shard) -> torch.Tensor:
        """For every token of a shard the one after it; -1 at the end of a window, and where none is predicted."""
        found = [
            [*map(int, ids[start + 1 : stop]), -1] if self.job.next_token else [-1] * (stop - start)
            for ids, (start, stop) in zip(shard.ids, shard.own, strict=True)
        ]
        return torch.tensor([i for one in found for i in one])

    def _columns(self, shard: Shard, tables: Mapping[str, _Tokens]) -> dict[str, np.ndarray]:
        """One row for each lens, site and token."""
        sites, lenses = len(self.sites), len(tables)
        tokens: dict[str, list[int]] = {"text": [], "place": [], "window": [], "position": [], "token_id": []}
        for n, (ids, (start, stop), spans) in enumerate(zip(shard.ids, shard.own, shard.spans, strict=True)):
            origin = [(text, first + i) for text, first, count in spans for i in range(count)]
            for p in range(start, stop):
                text, place = origin[p - stop + len(origin)]
                one = (text, place, shard.index * self.job.shard_windows + n, p, int(ids[p]))
                for name, value in zip(tokens, one, strict=True):
                    tokens[name].append(value)
        found: dict[str, np.ndarray] = {}
        for name, values in tokens.items():
            found[name] = np.tile(np.array(values, dtype=np.int64), sites * lenses)
        count = shard.tokens
        found["lens"] = np.repeat(np.arange(lenses, dtype=np.int32), sites * count)
        found["site"] = np.tile(np.repeat(np.arange(sites, dtype=np.int32), count), lenses)
        found["top_id"] = np.concatenate([t.top_id.reshape(-1).numpy().astype(np.int32) for t in tables.values()])
        for name in next(iter(tables.values())).values:
            value = np.concatenate([t.values[name].reshape(-1).numpy() for t in tables.values()])
            found[name] = np.nan_to_num(value, nan=-1).astype(np.int32) if name == "rank" else value.astype(np.float32)
        return found


class _Tokens:
    """What every token of a shard has given at every site, through one lens."""

    def __init__(self, shard: Shard, sites: int) -> None:
        self._own, self._sites = shard.own, sites
        self._first = [0, *accumulate(stop - start for start, stop in shard.own)]
        self.values: dict[str, torch.Tensor] = {}
        self.top_id = torch.full((sites, shard.tokens), -1)

    def slot(self, window: int, position: int) -> int:
        """Where a token is in the table."""
        return self._first[window] + position - self._own[window][0]

    def put(self, slots: torch.Tensor, values: Mapping[str, torch.Tensor], top_id: torch.Tensor) -> None:
        """Put in values and top tokens [sites, tokens]."""
        for name, value in values.items():
            if name not in self.values:
                self.values[name] = torch.full((self._sites, self._first[-1]), torch.nan, dtype=torch.float64)
            self.values[name][:, slots] = value
        self.top_id[:, slots] = top_id.cpu()

    def tokens(self, following: torch.Tensor) -> Tokens:
        """Which window each token is in, and what follows it."""
        assert bool((self.top_id >= 0).all()), "a token was not run"
        window = torch.arange(len(self._own)).repeat_interleave(torch.tensor([b - a for a, b in self._own]))
        return Tokens(window, following, self.top_id[-1:].T)


def _rows(part: Part) -> Iterator[tuple[tuple[int, ...], int]]:
    for owners, positions in zip(part.owners, part.positions, strict=True):
        for position in positions:
            yield owners, position


# -- shards on disk ----------------------------------------------------------------------------


def sums_file(folder: Path, index: int) -> Path:
    """Where the sums of a shard are. It is written last: with it the shard is done."""
    return folder / f"shard-{index:06}.safetensors"


def rows_file(folder: Path, index: int) -> Path:
    """Where the single tokens of a shard are."""
    return folder / f"rows-{index:06}.parquet"


def keep(folder: Path, worker: Worker, shard: Shard) -> dict[str, dict[str, Sums]]:
    """Do a shard and write it into a folder; its sums."""
    sums, columns = worker.do(shard)
    if worker.job.rows:
        _write_rows(rows_file(folder, shard.index), columns, worker)
    arrays: dict[str, np.ndarray] = {}
    names: list[list[Any]] = []
    for i, (lens, groups) in enumerate(sums.items()):
        names.append([lens, list(groups)])
        for j, one in enumerate(groups.values()):
            arrays |= {f"{i}.{j}.{name}": value for name, value in one.arrays().items()}
    about = {"run": worker.run, "digest": shard.digest, "names": names, "tokens": shard.tokens}
    metadata = {"shard": json.dumps(about)}  # one entry: several are written in any order
    write_atomically(sums_file(folder, shard.index), lambda path: save_file(arrays, path, metadata=metadata))
    return sums


def kept(folder: Path, index: int, run: str, digest: str) -> dict[str, dict[str, Sums]] | None:
    """The sums of a shard that is done; None of one that is not.

    Raises:
        InputError: it belongs to another run, is of other tokens, or is damaged.
    """
    file = sums_file(folder, index)
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="numpy") as opened:
            about = json.loads((opened.metadata() or {})["shard"])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{file} is damaged ({' '.join(str(error).split())[:120]}): remove it") from error
    if about.get("run") != run:
        raise InputError(f"{file} belongs to another sweep: give another folder, or remove that file")
    if about["digest"] != digest:
        raise InputError(
            f"{file} is of other tokens than the corpus has now: it has changed since; give another folder"
        )
    found: dict[str, dict[str, Sums]] = {}
    for i, (lens, groups) in enumerate(about["names"]):
        for j, group in enumerate(groups):
            prefix = f"{i}.{j}."
            own = {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}
            found.setdefault(lens, {})[group] = Sums.of_arrays(own)
    return found


def _write_rows(file: Path, columns: Mapping[str, np.ndarray], worker: Worker) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = {"lens": list(worker.plans), "site": list(worker.job.sites)}
    arrays: dict[str, Any] = {}
    for name, value in columns.items():
        if name in names:
            arrays[name] = pa.DictionaryArray.from_arrays(pa.array(value.astype(np.int32)), pa.array(names[name]))
        else:
            arrays[name] = pa.array(value)
    table = pa.table(arrays)
    write_atomically(file, lambda path: pq.write_table(table, path, compression="zstd"))
