"""A Reading: what a lens said at every site and position, as one labelled table.

The table has the dimensions prompt, site and position; log-probabilities, entropies and
divergences are in nats, ranks count from 1. Raw logits are never part of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logitlab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from rich.console import RenderableType

    from logitlab.views.widget import LensGrid

Array = NDArray[Any]

UNITS = {
    "top_id": "token id",
    "top_logprob": "nats",
    "entropy": "nats",
    "kl": "nats",
    "target_logprob": "nats",
    "target_rank": "1 = most likely",
    "bound": "nats",
    "box": "fraction of the picture",
}
"""Unit of every quantity in a Reading."""

_NO_TARGET = "no target was asked for; pass target= to read()"
_ABSENT = {
    "box": "the model gives no boxes",
    "entropy": "it was not asked for; name it in statistics= of read()",
    "kl": "it was not asked for; name it in statistics= of read()",
    "bound": "it is exact; only screened readings (precision= of read()) have one",
}
"""Why a quantity may be missing."""


@dataclass(frozen=True)
class Picture:
    """A picture that was part of a prompt, and which positions of the prompt stand for which part of it.

    Attributes:
        png: the picture as the model saw it (cut and scaled; the patch grid covers it), PNG bytes.
        grid: rows and columns of patches; (0, 0) where no position stands for a part of the picture.
        patches: (position, row, column) of every position that stands for a patch.
    """

    png: bytes = field(repr=False)
    grid: tuple[int, int] = (0, 0)
    patches: tuple[tuple[int, int, int], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model saw it.

    Attributes:
        text: the text it came from; None when token ids, a picture or a sound were given.
        ids: all its token ids, special tokens included; empty where positions are no tokens.
        tokens: a readable label for every position: a token (characters split over several tokens
            are repaired), ``patch 3,4`` of a picture, ``query 7`` of a detector, ``pooled`` for the
            answer of a model that gives one for the whole input.
        positions: the positions that were read, in order.
        pictures: the pictures that it holds.
    """

    text: str | None
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Target:
    """A token whose log-probability and rank were asked for."""

    id: int
    token: str


@dataclass(frozen=True)
class Cell:
    """What a lens says at one site and position.

    Attributes:
        tokens: labels of the most likely tokens, best first.
        ids: their token ids.
        probabilities: their probabilities, each from 0 to 1.
        entropy: in nats; None if it was not read.
        kl: KL divergence of this distribution from the model's final one, in nats; None if it was not read.
        target_probabilities: by target, in the Reading's order.
        target_ranks: by target, from 1.
        box: of a detector's query: centre x, centre y, width and height as fractions of the picture.
        bound: what screening can have added to the error of any of these numbers, in nats (0 where the cell was
            computed in full); None if nothing was to be screened.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    probabilities: tuple[float, ...]
    entropy: float | None
    kl: float | None
    target_probabilities: tuple[float, ...]
    target_ranks: tuple[int, ...]
    box: tuple[float, ...] | None = None
    bound: float | None = None


@dataclass(frozen=True, eq=False)
class Reading:
    """Statistics of decoded hidden states, labelled by prompt, site and position.

    The arrays have the shape [prompts, sites, positions, ...]; where prompts differ in length the
    shorter ones are filled with NaN (or -1 for ids and ranks). Use the labelled properties
    (`entropy`, `kl`, `rank`, ...), which are xarray arrays, `at` to select, `to_pandas` for one row
    a cell, and `cell` for one cell.

    Attributes:
        prompts: the prompts.
        sites: names of the sites, in order of depth, for instance ``"12.resid_post"``.
        targets: the tokens that were asked for.
        labels: a readable label for every token id that occurs in the table.
        arrays: by name (see `UNITS`): ``top_id`` and ``top_logprob`` [..., k], ``entropy``, ``kl``
            [...], ``target_logprob`` and ``target_rank`` [..., targets], ``box`` [..., 4] of detectors,
            ``bound`` [...] of screened readings.
        provenance: model and its fingerprint, verification, lens, versions, settings.
        completions: labels that replace `labels` at one (prompt, position), where the prompt ends in
            the middle of a character that the next token completes.
    """

    prompts: tuple[Prompt, ...]
    sites: tuple[str, ...]
    targets: tuple[Target, ...]
    labels: Mapping[int, str]
    arrays: Mapping[str, Array]
    provenance: Mapping[str, Any]
    completions: Mapping[tuple[int, int], Mapping[int, str]] = field(
        default_factory=dict[tuple[int, int], Mapping[int, str]]
    )

    @property
    def space(self) -> str:
        """What the columns are: ``vocabulary``, ``classes``, ``concepts`` or ``boxes`` (classes of boxes)."""
        return str(self.provenance.get("space", {}).get("name", "vocabulary"))

    @property
    def activation(self) -> str:
        """``softmax``, or ``sigmoid`` where each column is a question of its own."""
        return str(self.provenance.get("space", {}).get("activation", "softmax"))

    # -- labelled arrays -----------------------------------------------------------------------

    @property
    def entropy(self) -> xr.DataArray:
        """Entropy of each cell's distribution, nats, [prompt, site, position]."""
        return self._labelled("entropy")

    @property
    def kl(self) -> xr.DataArray:
        """KL(model's final distribution || this cell's), nats, [prompt, site, position]."""
        return self._labelled("kl")

    @property
    def bound(self) -> xr.DataArray:
        """What screening can have added to the error of any statistic of a cell, nats, [prompt, site, position].

        0 where a cell was computed in full. Ids and ranks are exact in any case.
        """
        return self._labelled("bound")

    @property
    def rank(self) -> xr.DataArray:
        """Rank of each target, 1 = most likely, [prompt, site, position, target]."""
        return self._labelled("target_rank")

    @property
    def logprob(self) -> xr.DataArray:
        """Log-probability of each target, nats, [prompt, site, position, target]."""
        return self._labelled("target_logprob")

    @property
    def prob(self) -> xr.DataArray:
        """Probability of each target, [prompt, site, position, target]."""
        logprob = self.logprob
        return logprob.copy(data=np.exp(logprob.values)).rename("target_prob").assign_attrs(units="1")

    @property
    def top_id(self) -> xr.DataArray:
        """Ids of the most likely tokens, [prompt, site, position, k]."""
        return self._labelled("top_id")

    @property
    def top_logprob(self) -> xr.DataArray:
        """Log-probabilities of the most likely tokens, nats, [prompt, site, position, k]."""
        return self._labelled("top_logprob")

    @property
    def top_token(self) -> xr.DataArray:
        """Labels of the most likely tokens, [prompt, site, position, k]."""
        ids = self.arrays["top_id"]
        names = np.empty(ids.shape, dtype=object)
        for n, s, p in np.ndindex(*ids.shape[:3]):
            if p < len(self.prompts[n].positions):
                names[n, s, p] = [self.label(int(i), n, p) for i in ids[n, s, p]]
            else:
                names[n, s, p] = ""
        return self.top_id.copy(data=names).rename("top_token").assign_attrs(units="token")

    @property
    def box(self) -> xr.DataArray:
        """Box of each query: centre x, centre y, width, height, [prompt, site, position, side]."""
        return self._labelled("box")

    def to_xarray(self) -> xr.Dataset:
        """Everything as one xarray Dataset, with units and provenance (nested parts as JSON) as attributes."""
        import xarray as xr

        names = [name for name in UNITS if name in self.arrays]
        attrs = {k: v if isinstance(v, str) else to_json(v) for k, v in self.provenance.items()}
        return xr.Dataset({name: self._labelled(name) for name in names}, attrs=attrs)

    def to_pandas(self) -> pd.DataFrame:
        """One row for every cell: prompt, site, position, token, top tokens, statistics, targets."""
        import pandas as pd

        return pd.DataFrame(list(self.rows()))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The cells as dictionaries of plain values, in order of prompt, site and position."""
        for n, prompt in enumerate(self.prompts):
            places = {
                position: {"picture": i, "row": row, "column": column}
                for i, picture in enumerate(prompt.pictures)
                for position, row, column in picture.patches
            }
            for s, site in enumerate(self.sites):
                layer, _, kind = site.partition(".")
                for p, position in enumerate(prompt.positions):
                    cell = self.cell(n, s, p)
                    yield {
                        "prompt": n,
                        "site": site,
                        "layer": int(layer),
                        "kind": kind,
                        "position": position,
                        "token": prompt.tokens[position],
                        "top": list(cell.tokens),
                        "top_id": list(cell.ids),
                        "top_prob": list(cell.probabilities),
                        **({} if cell.entropy is None else {"entropy": cell.entropy}),
                        **({} if cell.kl is None else {"kl": cell.kl}),
                        **({} if cell.bound is None else {"bound": cell.bound}),
                        "target": [t.token for t in self.targets],
                        "target_prob": list(cell.target_probabilities),
                        "target_rank": list(cell.target_ranks),
                        **({} if cell.box is None else {"box": list(cell.box)}),
                        **places.get(position, {}),
                    }

    def _labelled(self, name: str) -> xr.DataArray:
        import xarray as xr

        if name not in self.arrays:
            raise InputError(f"this Reading has no {name}: {_ABSENT.get(name, _NO_TARGET)}")
        values = self.arrays[name]
        width = values.shape[2]
        dims = ["prompt", "site", "position"]
        first = self.prompts[0].positions
        same = all(p.positions == first for p in self.prompts)
        filler = [(*p.positions, *[-1] * (width - len(p.positions))) for p in self.prompts]
        tokens = [[*(p.tokens[i] for i in p.positions), *[""] * (width - len(p.positions))] for p in self.prompts]
        coords: dict[str, Any] = {
            "prompt": np.arange(len(self.prompts)),
            "site": list(self.sites),
            "layer": ("site", [int(site.split(".")[0]) for site in self.sites]),
            "position": list(first) if same else np.arange(width),
            "token": (("prompt", "position"), tokens),
            "token_index": (("prompt", "position"), filler),
        }
        if any(p.pictures for p in self.prompts):
            where = [{q: (r, c) for pic in p.pictures for q, r, c in pic.patches} for p in self.prompts]
            for axis, label in enumerate(("row", "column")):
                places = [
                    [found.get(q, (-1, -1))[axis] for q in q_row] for found, q_row in zip(where, filler, strict=True)
                ]
                coords[label] = (("prompt", "position"), places)
        if name == "box":
            dims.append("side")
            coords["side"] = ["x", "y", "width", "height"]
        elif name.startswith("top_"):
            dims.append("k")
            coords["k"] = np.arange(1, values.shape[3] + 1)
        elif name.startswith("target_"):
            dims.append("target")
            coords["target"] = [t.token for t in self.targets]
            coords["target_id"] = ("target", [t.id for t in self.targets])
        return xr.DataArray(values, dims=dims, coords=coords, name=name, attrs={"units": UNITS[name]})

    # -- selection -----------------------------------------------------------------------------

    def at(
        self,
        *,
        prompt: int | Sequence[int] | None = None,
        site: str | Sequence[str] | None = None,
        position: int | Sequence[int] | None = None,
    ) -> Reading:
        """Select prompts, sites or positions; the result is again a Reading.

        Args:
            prompt: number of a prompt, or several.
            site: name of a site, or several.
            position: token positions in the prompt; negative ones count from each prompt's own end,
                so ``position=-1`` is the last token of every prompt.

        Raises:
            InputError: something selected is not in the table.

        Example:
            ``reading.at(position=-1).rank`` is the rank of each target at the last token.
        """
        chosen = range(len(self.prompts)) if prompt is None else _as_list(prompt)
        for n in chosen:
            if not -len(self.prompts) <= n < len(self.prompts):
                raise InputError(f"prompt {n} is not in this Reading: it has {len(self.prompts)}")
        chosen = [n % len(self.prompts) for n in chosen]
        sites = self.sites if site is None else tuple([site] if isinstance(site, str) else site)
        for name in sites:
            if name not in self.sites:
                raise InputError(f"site {name!r} is not in this Reading: it has {', '.join(_shortened(self.sites))}")
        rows = [self.sites.index(name) for name in sites]
        prompts: list[Prompt] = []
        slots: list[list[int]] = []
        for n in chosen:
            old = self.prompts[n]
            wanted = old.positions if position is None else [_resolve(p, old) for p in _as_list(position)]
            for p in wanted:
                if p not in old.positions:
                    raise InputError(f"position {p} was not read for prompt {n}: it has {_span(old.positions)}")
            prompts.append(replace(old, positions=tuple(wanted)))
            slots.append([old.positions.index(p) for p in wanted])
        arrays = {name: _pick(values, chosen, rows, slots) for name, values in self.arrays.items()}
        completions = {
            (i, slots[i].index(p)): labels
            for (n, p), labels in self.completions.items()
            for i, m in enumerate(chosen)
            if m == n and p in slots[i]
        }
        return replace(self, prompts=tuple(prompts), sites=sites, arrays=arrays, completions=completions)

    def label(self, token_id: int, prompt: int = 0, slot: int = 0) -> str:
        """Label of a token id at one cell (``slot`` counts the read positions of the prompt)."""
        special = self.completions.get((prompt, slot))
        if special is not None and token_id in special:
            return special[token_id]
        return self.labels[token_id]

    def cell(self, prompt: int, site: int | str, slot: int) -> Cell:
        """One cell: number of the prompt, name or number of the site, number of the read position."""
        s = self.sites.index(site) if isinstance(site, str) else site
        a = self.arrays
        where = (prompt, s, slot)
        ids = tuple(int(i) for i in a["top_id"][where])
        targets = "target_rank" in a
        return Cell(
            tokens=tuple(self.label(i, prompt, slot) for i in ids),
            ids=ids,
            probabilities=tuple(float(np.exp(v)) for v in a["top_logprob"][where]),
            entropy=float(a["entropy"][where]) if "entropy" in a else None,
            kl=float(a["kl"][where]) if "kl" in a else None,
            target_probabilities=tuple(float(np.exp(v)) for v in a["target_logprob"][where]) if targets else (),
            target_ranks=tuple(int(v) for v in a["target_rank"][where]) if targets else (),
            box=tuple(float(v) for v in a["box"][where]) if "box" in a else None,
            bound=float(a["bound"][where]) if "bound" in a else None,
        )

    # -- files and views -----------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the table and its provenance to a Parquet file; `load` gives an equal Reading back.

        Raises:
            InputError: the file cannot be written; an older file is then still whole.
        """
        from logitlab.storage import save

        return save(self, path)

    @staticmethod
    def load(path: str | Path) -> Reading:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or it does not hold a Reading.
        """
        from logitlab.storage import load

        return load(path)

    def html(self, path: str | Path) -> Path:
        """Write the interactive page: one file that needs no network."""
        from logitlab.files import write_text
        from logitlab.views.page import page

        return write_text(path, page(self))

    def widget(self, theme: str = "auto") -> LensGrid:
        """The interactive grid for a notebook, whose selected cell Python can see and set.

        (A Reading that ends a notebook's cell is shown as a page in a frame: that also survives in a saved
        notebook, but Python cannot see what is selected in it.)

        Args:
            theme: ``auto``, ``light`` or ``dark``.

        Raises:
            InputError: anywidget is not installed, or there is no such theme.

        Example:
            ``grid = reading.widget()``; after a click, ``grid.selection`` is a dictionary such as
            ``{"prompt": 0, "site": "3.resid_post", "position": 2, "token": " is"}``.
        """
        from logitlab.views.widget import LensGrid

        return LensGrid(self, theme=theme)

    def figure(self, path: str | Path, *, prompt: int = 0) -> Path:
        """Write a publication figure of one prompt; the ending (.png, .svg, .pdf) sets the format."""
        from logitlab.views.figure import save_figure

        return save_figure(self, path, prompt=prompt)

    def __rich__(self) -> RenderableType:
        from logitlab.views.terminal import grid

        return grid(self)

    def __repr__(self) -> str:
        from logitlab.views.terminal import grid_text

        return grid_text(self)

    def _repr_html_(self) -> str:
        from logitlab.views.page import embedded

        return embedded(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reading):
            return NotImplemented
        mine = (self.prompts, self.sites, self.targets, dict(self.labels), dict(self.provenance), self._completions())
        theirs = (
            other.prompts,
            other.sites,
            other.targets,
            dict(other.labels),
            dict(other.provenance),
            other._completions(),
        )
        if mine != theirs or self.arrays.keys() != other.arrays.keys():
            return False
        return all(
            values.dtype == other.arrays[name].dtype
            and np.array_equal(values, other.arrays[name], equal_nan=values.dtype.kind == "f")
            for name, values in self.arrays.items()
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def _completions(self) -> dict[tuple[int, int], dict[int, str]]:
        return {where: dict(labels) for where, labels in self.completions.items()}


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Plain values as JSON; numbers that are not finite become null, since JSON has no NaN and no infinity."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        pairs: Any = value.items()
        return {key: _finite(item) for key, item in pairs}
    if isinstance(value, list | tuple):
        items: Any = value
        return [_finite(item) for item in items]
    return value


def _as_list(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _resolve(position: int, prompt: Prompt) -> int:
    return position + len(prompt.tokens) if position < 0 else position


def _span(positions: Sequence[int]) -> str:
    return f"{len(positions)} positions, {positions[0]} to {positions[-1]}" if positions else "none"


def _shortened(names: Sequence[str], most: int = 6) -> list[str]:
    return list(names) if len(names) <= most else [*names[: most - 1], "...", names[-1]]


def _pick(values: Array, prompts: Sequence[int], rows: Sequence[int], slots: Sequence[Sequence[int]]) -> Array:
    """Select from [prompts, sites, positions, ...], filling short prompts again."""
    width = max((len(s) for s in slots), default=0)
    fill = np.nan if values.dtype.kind == "f" else -1
    picked = np.full((len(prompts), len(rows), width, *values.shape[3:]), fill, dtype=values.dtype)
    for i, (n, places) in enumerate(zip(prompts, slots, strict=True)):
        picked[i, :, : len(places)] = values[n][list(rows)][:, list(places)]
    return picked
