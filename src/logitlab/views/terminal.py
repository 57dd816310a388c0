"""A Reading as a grid for the terminal: sites from bottom to top, prompt tokens from left to right."""

from __future__ import annotations

import io
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
from logitlab.reading import Reading
from logitlab.views import colour
from logitlab.views.tokens import cell_label, lens_name, model_name, percent, site_names, verified, visible

_NARROW, _WIDE = 7, 16  # widths between which a column of tokens may vary
_SHADES = [Style(color=fore, bgcolor=back) for back, fore in colour.table(dark=True)]
_PLAIN, _DIM, _BOLD = Style(), Style(dim=True), Style(bold=True)


def grid(
    reading: Reading,
    *,
    width: int | None = None,
    prompt: int | None = None,
    rows: int | None = None,
    panels: int | None = None,
) -> RenderableType:
    """The grid of top tokens, shaded by probability; the last layer is at the top.

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

    Raises:
        InputError: there is no such prompt.
    """
    count = len(reading.prompts)
    if prompt is not None and not -count <= prompt < count:
        raise InputError(f"prompt {prompt} is not in this Reading: it has {count}")
    shown = range(count) if prompt is None else [prompt % count]
    return _Grid(reading, shown, width, rows, panels)


def grid_text(reading: Reading, width: int = 100, *, rows: int | None = None, panels: int | None = 6) -> str:
    """The grid as plain text without colours."""
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, force_jupyter=False, legacy_windows=False)
    console.print(grid(reading, width=width, rows=rows, panels=panels))
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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(self.width or options.max_width, options.max_width)
        sites = _thinned(len(self.reading.sites), self.rows)[::-1]
        for n in self.shown:
            yield from self._prompt(n, sites, width)
        coloured = console.color_system is not None and not console.no_color
        for line in self._footer(len(sites), coloured):
            yield from line.wrap(console, width)

    def _prompt(self, n: int, sites: Sequence[int], width: int) -> Iterator[Text]:
        prompt = self.reading.prompts[n]
        if len(self.reading.prompts) > 1:
            text = "".join(prompt.tokens) if prompt.text is None else prompt.text
            title = f"prompt {n + 1} of {len(self.reading.prompts)}: {visible(text, space=' ')}"
            yield _line((_fitted(title, width), _BOLD))
        if not sites or not prompt.positions:
            yield _line(("nothing was read", _DIM))
            return
        names = [site_names(self.reading.sites)[s] for s in sites]
        margin = min(max(map(cell_len, names)), max(width - 20, 6))
        columns = self._columns(n, sites)
        packed = _packed(columns, width - margin)
        kept = _kept(len(packed), self.panels)
        for before, i in pairwise([-1, *kept]):
            if i > before + 1:
                yield _line((_fitted(_omitted(packed[before + 1 : i], prompt.positions), width), _DIM))
            panel = packed[i]
            yield _line((" " * margin, _PLAIN), *((" " + _fitted(c.head, w, c.slot is None), _DIM) for c, w in panel))
            yield _line((" " * margin, _PLAIN), *((" " + _fitted(c.name, w, c.slot is None), _BOLD) for c, w in panel))
            for row, name in enumerate(names):
                cells = ((" " + _fitted(c.cells[row][0], w, c.slot is None), c.cells[row][1]) for c, w in panel)
                yield _line((_fitted(name, margin, right=True), _DIM), *cells)
            yield Text()

    def _columns(self, n: int, sites: Sequence[int]) -> list[_Column]:
        reading, prompt = self.reading, self.reading.prompts[n]
        ids = reading.arrays["top_id"][n, :, :, 0]
        probabilities = np.exp(reading.arrays["top_logprob"][n, :, :, 0])
        columns = [
            _Column(
                head=str(position),
                name=visible(prompt.tokens[position]),
                cells=[(cell_label(reading, int(ids[s, p]), n, p), _shade(float(probabilities[s, p]))) for s in sites],
                slot=p,
            )
            for p, position in enumerate(prompt.positions)
        ]
        last = len(prompt.positions) - 1
        columns.append(_Column("", "p", [(f"{percent(float(probabilities[s, last])):>4}", _PLAIN) for s in sites]))
        for t, target in enumerate(reading.targets):
            ranks = [f"{int(r):,}" for r in reading.arrays["target_rank"][n, sites, last, t]]
            chances = [percent(float(np.exp(v))) for v in reading.arrays["target_logprob"][n, sites, last, t]]
            size = max(len("rank"), *map(len, ranks))
            cells = [
                (f"{rank:>{size}} {chance:>4}", _BOLD if rank == "1" else _PLAIN)
                for rank, chance in zip(ranks, chances, strict=True)
            ]
            columns.append(_Column(f"{'rank':>{size}} {'p':>4}", _fitted(visible(target.token), size + 5, True), cells))
        return columns

    def _footer(self, rows: int, coloured: bool) -> Iterator[Text]:
        reading, checked = self.reading, verified(self.reading)
        facts = [model_name(reading), lens_name(reading), f"✓ {checked}" if checked else "not verified"]
        yield Text(" · ".join(fact for fact in facts if fact))
        notes = "p: probability of the top token at the last position"
        yield Text(notes + (", then rank and p of each target there" if reading.targets else ""), style=_DIM)
        if rows < len(reading.sites):
            yield Text(f"{rows} of {len(reading.sites)} sites shown", style=_DIM)
        if coloured:
            marks = [(f" {percent(f)} ", _shade(f)) for f in (0.0, 0.25, 0.5, 0.75, 1.0)]
            yield Text.assemble(("shade: probability of the top token ", _DIM), *marks)


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


def _thinned(count: int, most: int | None) -> list[int]:
    if most is None or count <= most:
        return list(range(count))
    return [round(x) for x in np.linspace(0, count - 1, most).tolist()] if most > 1 else [count - 1]


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
