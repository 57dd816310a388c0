"""A Reading for the terminal: a grid, sites from bottom to top and prompt tokens from left to right.

A prompt with a picture has too many positions for that: its patches are summed up by site, with a map
of the picture at one of them. A detector has a table of what its queries found.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.style import Style
from rich.text import Text

from logitlab.errors import InputError
from logitlab.reading import Picture, Reading
from logitlab.views import colour, pictures
from logitlab.views.tokens import (
    cell_label,
    label_space,
    largest_bound,
    lens_name,
    model_name,
    noun,
    percent,
    rounded_up,
    site_names,
    verified,
    visible,
)

_NARROW, _WIDE = 7, 16  # widths between which a column of tokens may vary
_BEST = 4  # at most so many detections of a site are written out
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_KEY = 12  # labels of a map that have a letter of their own
_SHADES = [Style(color=fore, bgcolor=back) for back, fore in colour.table(dark=True)]
_PLAIN, _DIM, _BOLD = Style(), Style(dim=True), Style(bold=True)


def grid(
    reading: Reading,
    *,
    width: int | None = None,
    prompt: int | None = None,
    rows: int | None = None,
    panels: int | None = None,
    site: str | None = None,
) -> RenderableType:
    """The grid of top tokens, shaded by probability; the last layer is at the top.

    A prompt with patches of a picture has a table instead: the answer by site, and the most frequent
    top label of the patches with its share of them; then a map of the patches at one site, and for a
    model of tokens the grid of the other positions. A detector has a table of its best queries by site.

    Positions that do not fit beside each other continue in another panel below. The last column
    holds the probability of the top token at the last position; targets follow with rank and
    probability there.

    Args:
        reading: what to show.
        width: columns to use; by default, and at most, those of the terminal.
        prompt: number of the only prompt to show.
        rows: show at most this many sites, evenly chosen; the last and the first always remain.
        panels: show at most this many panels a prompt, and say which positions were left out; the
            last position always remains.
        site: name of the site whose map of patches is drawn; by default the last one.

    Raises:
        InputError: there is no such prompt or site.
    """
    count = len(reading.prompts)
    if prompt is not None and not -count <= prompt < count:
        raise InputError(f"prompt {prompt} is not in this Reading: it has {count}")
    if site is not None and site not in reading.sites:
        raise InputError(f"site {site!r} is not in this Reading: it has {', '.join(reading.sites)}")
    shown = range(count) if prompt is None else [prompt % count]
    return _Grid(reading, shown, width, rows, panels, site)


def grid_text(
    reading: Reading,
    width: int = 100,
    *,
    rows: int | None = None,
    panels: int | None = 6,
    site: str | None = None,
) -> str:
    """The grid as plain text without colours."""
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, force_jupyter=False, legacy_windows=False)
    console.print(grid(reading, width=width, rows=rows, panels=panels, site=site))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


@dataclass
class _Column:
    head: str
    name: str
    cells: Sequence[tuple[str, Style]]
    slot: int | None = None  # number of the read position; None for the columns after the last one

    @cached_property
    def longest(self) -> int:
        return max(map(cell_len, (self.head, self.name, *(text for text, _ in self.cells))))


@dataclass(frozen=True)
class _Grid:
    reading: Reading
    shown: Sequence[int]
    width: int | None
    rows: int | None
    panels: int | None
    site: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(self.width or options.max_width, options.max_width)
        sites = pictures.thinned(len(self.reading.sites), self.rows)[::-1]
        for n in self.shown:
            yield from self._prompt(n, sites, width)
        coloured = console.color_system is not None and not console.no_color
        for line in self._footer(len(sites), coloured):
            yield from line.wrap(console, width)

    def _prompt(self, n: int, sites: Sequence[int], width: int) -> Iterator[Text]:
        prompt = self.reading.prompts[n]
        if len(self.reading.prompts) > 1:
            title = f"prompt {n + 1} of {len(self.reading.prompts)}: {visible(pictures.title(prompt), space=' ')}"
            yield _line((_fitted(title, width), _BOLD))
        if not sites or not prompt.positions:
            yield _line(("nothing was read", _DIM))
            return
        if pictures.is_detector(self.reading):
            yield from self._panels(n, sites, self._detected(n, sites, width), width)
            return
        found = pictures.patched(prompt)
        if not found:
            yield from self._panels(n, sites, self._columns(n, sites, range(len(prompt.positions))), width)
            return
        yield from self._panels(n, sites, self._summary(n, sites, found, width), width)
        for i, picture, patches in found:
            yield from self._map(n, i, picture, patches, width)
        rest = pictures.others(prompt)
        if self.reading.space == "vocabulary" and len(rest) > 1:
            yield from self._panels(n, sites, self._columns(n, sites, rest), width)

    def _panels(self, n: int, sites: Sequence[int], columns: Sequence[_Column], width: int) -> Iterator[Text]:
        """Columns beside each other, and below each other where they do not fit."""
        positions = self.reading.prompts[n].positions
        names = self._names(sites)
        margin = self._margin(sites, width)
        packed = _packed(columns, width - margin)
        kept = _kept(len(packed), self.panels)
        for before, i in pairwise([-1, *kept]):
            if i > before + 1:
                yield _line((_fitted(_omitted(packed[before + 1 : i], positions), width), _DIM))
            panel = packed[i]
            yield _line((" " * margin, _PLAIN), *((" " + _fitted(c.head, w, c.slot is None), _DIM) for c, w in panel))
            yield _line((" " * margin, _PLAIN), *((" " + _fitted(c.name, w, c.slot is None), _BOLD) for c, w in panel))
            for row, name in enumerate(names):
                cells = ((" " + _fitted(c.cells[row][0], w, c.slot is None), c.cells[row][1]) for c, w in panel)
                yield _line((_fitted(name, margin, right=True), _DIM), *cells)
            yield Text()

    def _names(self, sites: Sequence[int]) -> list[str]:
        names = site_names(self.reading.sites)
        return [names[s] for s in sites]

    def _margin(self, sites: Sequence[int], width: int) -> int:
        return min(max(map(cell_len, self._names(sites))), max(width - 20, 6))

    def _columns(self, n: int, sites: Sequence[int], slots: Sequence[int]) -> list[_Column]:
        """A column for each of some read positions, then those about the last of them."""
        reading, prompt = self.reading, self.reading.prompts[n]
        ids = reading.arrays["top_id"][n, :, :, 0]
        probabilities = np.exp(reading.arrays["top_logprob"][n, :, :, 0])
        names = pictures.position_names(prompt)
        columns = [
            _Column(
                head=str(prompt.positions[p]),
                name=names[p],
                cells=[(cell_label(reading, int(ids[s, p]), n, p), _shade(float(probabilities[s, p]))) for s in sites],
                slot=p,
            )
            for p in slots
        ]
        last = slots[-1]
        columns.append(_Column("", "p", [(f"{percent(float(probabilities[s, last])):>4}", _PLAIN) for s in sites]))
        return columns + self._targets(n, sites, last)

    def _targets(self, n: int, sites: Sequence[int], slot: int) -> list[_Column]:
        """Rank and probability of each target at one position."""
        reading = self.reading
        columns: list[_Column] = []
        for t, target in enumerate(reading.targets):
            ranks = [f"{int(r):,}" for r in reading.arrays["target_rank"][n, sites, slot, t]]
            chances = [percent(float(np.exp(v))) for v in reading.arrays["target_logprob"][n, sites, slot, t]]
            size = max(len("rank"), *map(len, ranks))
            cells = [
                (f"{rank:>{size}} {chance:>4}", _BOLD if rank == "1" else _PLAIN)
                for rank, chance in zip(ranks, chances, strict=True)
            ]
            name = _fitted(visible(target.token, space=label_space(reading)), size + 5, True)
            columns.append(_Column(f"{'rank':>{size}} {'p':>4}", name, cells))
        return columns

    def _summary(
        self,
        n: int,
        sites: Sequence[int],
        found: Sequence[tuple[int, Picture, Sequence[pictures.Patch]]],
        width: int,
    ) -> list[_Column]:
        """The answer by site, its targets, and for every picture the most frequent top label of its patches."""
        reading, prompt = self.reading, self.reading.prompts[n]
        slot = pictures.answer(prompt)
        ids, chances = reading.arrays["top_id"][n, :, :, 0], np.exp(reading.arrays["top_logprob"][n, :, :, 0])
        answers = [
            (
                cell_label(reading, int(ids[s, slot]), n, slot),
                percent(float(chances[s, slot])),
                _shade(chances[s, slot]),
            )
            for s in sites
        ]
        targets = self._targets(n, sites, slot)
        room = width - self._margin(sites, width)
        # Every column has a space before it, and a space and four characters for the percentage in it.
        free = room - sum(c.longest + 1 for c in targets) - 6 * (1 + len(found))
        most = max(1, min(room - 6, max(12, min(32, free // (1 + len(found))))))
        columns = [_shares("answer", pictures.position_names(prompt)[slot], "p", answers, most), *targets]
        for i, _, patches in found:
            slots = [patch.slot for patch in patches]
            tops = [_frequent_label(reading, n, s, slots) for s in sites]
            which = f"picture {i + 1}, " if len(prompt.pictures) > 1 else ""
            cells = [(label, percent(share), _PLAIN) for label, share in tops]
            columns.append(_shares(f"{which}{len(slots)} patches", "most frequent", "share", cells, most))
        return columns

    def _map(
        self, n: int, number: int, picture: Picture, patches: Sequence[pictures.Patch], width: int
    ) -> Iterator[Text]:
        """The top label of every patch at one site as a letter; nothing is drawn where the grid does not fit."""
        reading = self.reading
        s = len(reading.sites) - 1 if self.site is None else reading.sites.index(self.site)
        which = f" of picture {number + 1}" if len(reading.prompts[n].pictures) > 1 else ""
        rows, columns = picture.grid
        head = f"patches{which} at {visible(reading.sites[s])}"
        step = 2 if 2 * columns <= width else 1
        if columns > width:
            yield _line((_fitted(head, width), _BOLD))
            text = f"{rows} by {columns} patches do not fit here: Reading.figure and Reading.html draw the picture"
            yield from _wrapped(text, width)
            yield Text()
            return
        ids = [int(reading.arrays["top_id"][n, s, patch.slot, 0]) for patch in patches]
        lettered = dict(zip(pictures.frequent(ids, _KEY), _LETTERS, strict=False))
        cells = [[(" " * step, _PLAIN)] * columns for _ in range(rows)]
        for patch, label in zip(patches, ids, strict=True):
            chance = float(np.exp(reading.arrays["top_logprob"][n, s, patch.slot, 0]))
            cells[patch.row][patch.column] = (f"{lettered.get(label, '·'):<{step}}", _shade(chance))
        yield _line((_fitted(head, width), _BOLD))
        for row in cells:
            yield _line(*row)
        for label, letter in lettered.items():
            slot = patches[ids.index(label)].slot
            count = _counted(ids.count(label), "patch")
            room = width - cell_len(f"{letter} =  ({count})")
            name = cell_label(reading, label, n, slot)
            name = _fitted(name, max(room, 1)) if cell_len(name) > room else name
            yield _line((_fitted(f"{letter} = {name} ({count})", width), _DIM))
        rest = [label for label in ids if label not in lettered]
        if rest:
            text = f"· = {_counted(len(set(rest)), 'other label')} ({_counted(len(rest), 'patch')})"
            yield _line((_fitted(text, width), _DIM))
        if len(patches) < rows * columns:
            yield _line((_fitted(f"blank: not read ({_counted(rows * columns - len(patches), 'patch')})", width), _DIM))
        yield Text()

    def _detected(self, n: int, sites: Sequence[int], width: int) -> list[_Column]:
        """By site: the number of queries above the threshold, each target's best query, the best detections."""
        reading = self.reading
        space = label_space(reading)
        found = [pictures.detections(reading, n, s) for s in sites]
        above = [sum(d.probability > pictures.THRESHOLD for d in best) for best in found]
        columns = [_Column("queries", f"p>{pictures.THRESHOLD:.0%}", [(str(count), _PLAIN) for count in above])]
        for t, target in enumerate(reading.targets):
            best = [pictures.detections(reading, n, s, t)[:1] for s in sites]
            cells = [(percent(d[0].probability) if d else "–", _shade(d[0].probability if d else 0)) for d in best]
            columns.append(_Column("best", _fitted(visible(target.token, space=space), 12).rstrip(), cells))
        room = width - self._margin(sites, width) - sum(c.longest + 1 for c in columns)
        # As many as fit beside each other: on a second panel few would look for them.
        for count in range(min(_BEST, max(map(len, found), default=0)), 0, -1):
            best = [self._best(n, found, i, 20) for i in range(count)]
            if count == 1 or sum(c.longest + 1 for c in best) <= room:
                whole = width - self._margin(sites, width) - 1
                return [
                    *columns,
                    *(best if best[0].longest <= whole else [self._best(n, found, 0, max(whole - 30, 3))]),
                ]
        return columns

    def _best(self, n: int, found: Sequence[Sequence[pictures.Detection]], i: int, most: int) -> _Column:
        """The detection in place ``i`` by site: label, probability, position of the query, box."""
        space, positions = label_space(self.reading), self.reading.prompts[n].positions
        labels = [visible(best[i].label, space=space) if i < len(best) else "" for best in found]
        size = min(most, max(map(cell_len, ("label", *labels))))
        cells: list[tuple[str, Style]] = []
        for label, best in zip(labels, found, strict=True):
            if i >= len(best):
                cells.append(("", _PLAIN))
                continue
            box = " ".join(f"{side:.2f}" for side in best[i].box)
            text = f"{_fitted(label, size)} {percent(best[i].probability):>4} {positions[best[i].slot]:>3} {box}"
            cells.append((text, _shade(best[i].probability)))
        longest = max(cell_len(text) for text, _ in cells)
        name = f"{_fitted('label', size)}    p   q x    y    w    h"
        return _Column(
            _fitted(f"best {i + 1}", longest),
            _fitted(name, longest),
            [(_fitted(text, longest), style) for text, style in cells],
        )

    def _footer(self, rows: int, coloured: bool) -> Iterator[Text]:
        reading, checked, what = self.reading, verified(self.reading), noun(self.reading)
        facts = [model_name(reading), lens_name(reading), f"✓ {checked}" if checked else "not verified"]
        yield Text(" · ".join(fact for fact in facts if fact))
        yield from (Text(note, style=_DIM) for note in self._notes(what))
        if rows < len(reading.sites):
            yield Text(f"{rows} of {len(reading.sites)} sites shown", style=_DIM)
        if coloured:
            which = "best" if pictures.is_detector(reading) else "top"
            marks = [(f" {percent(f)} ", _shade(f)) for f in (0.0, 0.25, 0.5, 0.75, 1.0)]
            yield Text.assemble((f"shade: probability of the {which} {what} ", _DIM), *marks)

    def _notes(self, what: str) -> Iterator[str]:
        reading = self.reading
        if (bound := largest_bound(reading)) > 0:
            yield f"screened: within {rounded_up(bound):.1e} nats of what it would be in full"
        if pictures.is_detector(reading):
            yield f"p: probability of a query's best class other than {pictures.NO_OBJECT}"
            yield "q: number of the query; x y w h: centre, width and height of its box as fractions of the picture"
        else:
            summed = [bool(pictures.patched(reading.prompts[n])) for n in self.shown]
            where = "the answer" if all(summed) and summed else "the last position"
            text = f"p: probability of the top {what} at {where}"
            yield text + (", then rank and p of each target there" if reading.targets else "")
            if any(summed):
                yield f"share: of the patches that have this top {what}"
        if reading.activation == "sigmoid":
            yield pictures.INDEPENDENT


def _frequent_label(reading: Reading, prompt: int, site: int, slots: Sequence[int]) -> tuple[str, float]:
    """The most frequent top label of some cells of a site, and its share of them."""
    ids = [int(reading.arrays["top_id"][prompt, site, slot, 0]) for slot in slots]
    best = pictures.frequent(ids, 1)
    if not best:
        return "–", np.nan
    return cell_label(reading, best[0], prompt, slots[ids.index(best[0])]), ids.count(best[0]) / len(ids)


def _shares(head: str, name: str, unit: str, cells: Sequence[tuple[str, str, Style]], most: int) -> _Column:
    """A column of labels with a percentage each."""
    wanted = max(cell_len(name) + len(unit) - 4, cell_len(head) - 5, *(cell_len(label) for label, _, _ in cells))
    size = max(min(most, wanted), 1)
    gap = size + 4 - len(unit)
    below = f"{_fitted(name, gap)} {unit}" if gap > 0 else unit
    texts = [(f"{_fitted(label, size)} {share:>4}", style) for label, share, style in cells]
    return _Column(_fitted(head, size + 5), _fitted(below, size + 5), texts)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "es" if what.endswith("ch") else "s")


def _wrapped(text: str, width: int) -> Iterator[Text]:
    for line in textwrap.wrap(text, width):
        yield _line((line, _DIM))


def _packed(columns: Sequence[_Column], room: int) -> list[list[tuple[_Column, int]]]:
    """Columns in as few panels as possible, then as wide as that number of panels allows."""
    widest = room - 6  # leaves a place for the probability beside the last position
    fewest = _packed_at(columns, room, min(_NARROW, widest))
    for cap in range(min(_WIDE, widest), _NARROW, -1):
        packed = _packed_at(columns, room, cap)
        if len(packed) == len(fewest):
            return packed
    return fewest


def _packed_at(columns: Sequence[_Column], room: int, cap: int) -> list[list[tuple[_Column, int]]]:
    panels: list[list[tuple[_Column, int]]] = [[]]
    free = room
    for i, column in enumerate(columns):
        width = min(column.longest, cap if column.slot is not None else room - 1)
        # The probability of the last position stays beside it.
        follower = columns[i + 1] if i + 1 < len(columns) else None
        is_last = column.slot is not None and follower is not None and follower.slot is None
        needed = width + 1 + (5 if is_last else 0)
        if panels[-1] and needed > free:
            panels.append([])
            free = room
        panels[-1].append((column, width))
        free -= width + 1
    return panels


def _omitted(panels: Sequence[Sequence[tuple[_Column, int]]], positions: Sequence[int]) -> str:
    slots = [column.slot for panel in panels for column, _ in panel if column.slot is not None]
    return f"… positions {positions[slots[0]]} to {positions[slots[-1]]} are not shown here …" if slots else "…"


def _kept(count: int, most: int | None) -> list[int]:
    """The first panel, and the last ones."""
    if most is None or count <= most:
        return list(range(count))
    return [0, *range(count - most + 1, count)] if most > 1 else [count - 1]


def _shade(probability: float) -> Style:
    return _SHADES[round(np.nan_to_num(probability) * (len(_SHADES) - 1))]


def _fitted(text: str, width: int, right: bool = False) -> str:
    """Text in exactly ``width`` terminal columns, cut with an ellipsis where it is longer."""
    length = cell_len(text)
    if length > width:
        text = set_cell_size(text, width - 1).rstrip() + "…"
        length = cell_len(text)
    gap = " " * (width - length)
    return gap + text if right else text + gap


def _line(*parts: tuple[str, Style]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="crop")
