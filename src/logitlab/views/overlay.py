"""Figures of readings of pictures: small multiples over the sites, with patches coloured or boxes drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len, set_cell_size

from logitlab.errors import InputError
from logitlab.reading import Picture, Reading
from logitlab.views import colour, pictures
from logitlab.views.tokens import cell_label, label_space, lens_name, model_name, noun, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure, SubFigure

    from logitlab.views.pictures import Detection, Patch

_PANELS = 12  # sites of a figure
_LABEL = 24  # characters of a label
_FAINT, _STRONG = 0.2, 0.8  # opacity of a patch of probability 0 and 1
_EVEN = 0.65  # opacity where the colour says the probability
_SMALL, _TEXT = 6.5, 8.0  # points
_PANEL, _WIDEST, _HIGHEST = 1.85, 2.6, 3.4  # inches: side of a square panel, limits of the others

Image = NDArray[np.float64]


def figure(reading: Reading, prompt: int, fonts: Sequence[str]) -> Figure | None:
    """The figure of a prompt with a picture, or None where no read position is a patch or a query.

    Args:
        reading: what to show.
        prompt: number of the prompt.
        fonts: families that are tried in turn.

    Raises:
        InputError: the picture cannot be decoded.
    """
    held = reading.prompts[prompt]
    if pictures.is_detector(reading):
        picture = held.pictures[0] if held.pictures else None
        blocks = [_Boxes(reading, prompt, fonts, picture, t) for t in _targets(reading)]
        return _drawn(reading, blocks)
    found = pictures.patched(held)
    if not found:
        return None
    many = len(held.pictures) > 1
    return _drawn(
        reading,
        [
            _Patches(reading, prompt, fonts, picture, t, patches, f"picture {i + 1}" if many else "")
            for i, picture, patches in found
            for t in _targets(reading)
        ],
    )


def _targets(reading: Reading) -> list[int] | list[None]:
    return list(range(len(reading.targets))) if reading.targets else [None]


def _drawn(reading: Reading, blocks: Sequence[_Block]) -> Figure:
    from matplotlib.figure import Figure

    sites = pictures.thinned(len(reading.sites), _PANELS)
    columns = len(sites) if len(sites) <= 4 else 3 if len(sites) in (5, 6, 9) else 4
    rows = -(-len(sites) // columns)
    width = max(columns * (max(block.size[0] for block in blocks) + 0.12) + 0.1, 3.4)
    heights = [block.height(rows, sites, width) for block in blocks]
    drawn = Figure(figsize=(width, sum(heights) + 0.3), layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # pyright: ignore[reportOptionalMemberAccess,reportCallIssue]
    title = " · ".join(part for part in (model_name(reading), lens_name(reading)) if part)
    drawn.suptitle(title, fontsize=_TEXT + 1, fontweight="bold", parse_math=False, family=blocks[0].fonts)
    parts: Any = drawn.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)
    for part, block in zip(parts[:, 0], blocks, strict=True):
        axes = part.subplots(rows, columns, squeeze=False).ravel()
        for s, one in zip(sites, axes, strict=False):
            block.panel(one, s, block.titles(sites)[s])
        for one in axes[len(sites) :]:
            one.set_visible(False)
        block.legend(part, axes[: len(sites)], sites)
    return drawn


class _Block:
    """Panels of one picture (and one target), one for each site."""

    def __init__(
        self, reading: Reading, n: int, fonts: Sequence[str], picture: Picture | None, target: int | None
    ) -> None:
        self.reading, self.n, self.target = reading, n, target
        self.fonts = list(fonts)
        self.image = _decoded(picture, n)
        high, wide = self.image.shape[:2]
        ratio = (high / wide) ** 0.5
        self.size = (min(_PANEL / ratio, _WIDEST), min(_PANEL * ratio, _HIGHEST))
        self.colours: dict[int, str] = {}
        self.space = label_space(reading)

    def said(self, site: int, most: int) -> str:
        """What a panel's title says after the site, in at most so many characters."""
        raise NotImplementedError

    def entries(self) -> list[tuple[str, str]]:
        """Colours and labels of the legend."""
        raise NotImplementedError

    def heading(self) -> str:
        """What the panels have in common, above them."""
        raise NotImplementedError

    def panel(self, axes: Axes, site: int, title: str) -> None:
        """Draw one site."""
        raise NotImplementedError

    def legend(self, part: SubFigure, axes: Sequence[Axes], sites: Sequence[int]) -> None:
        """Say what the colours mean."""
        raise NotImplementedError

    def picture(self, axes: Axes, image: Image, title: str) -> None:
        """The picture in coordinates from 0 to 1, and the panel's title."""
        high, wide = image.shape[:2]
        shades: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1} if image.ndim == 2 else {}
        axes.imshow(image, extent=(0, 1, 1, 0), aspect=high / wide, interpolation="antialiased", **shades)
        axes.set_xlim(0, 1)
        axes.set_ylim(1, 0)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(linewidth=0.5, color="#b9c0ca")
        axes.set_title(title, fontsize=_SMALL, family=self.fonts, parse_math=False, pad=3)

    def titles(self, sites: Sequence[int]) -> dict[int, str]:
        """Site and what is said there, all on one line if all fit, else all on two."""
        room = int(self.size[0] * 17)  # characters
        names = {s: visible(self.reading.sites[s]) for s in sites}
        one = {s: f"{name}: {self.said(s, _LABEL + 8)}" for s, name in names.items()}
        if max(map(cell_len, one.values())) <= room:
            return one
        return {s: f"{cut(name, room - 1)}:\n{self.said(s, room)}" for s, name in names.items()}

    def height(self, rows: int, sites: Sequence[int], width: float) -> float:
        """Inches that the block takes in a figure of some width."""
        title = 0.31 if "\n" in self.titles(sites)[sites[0]] else 0.2
        entries = self.entries()
        key = 0.3 + 0.14 * -(-len(entries) // self._columns(entries, width)) if entries else 0.0
        scale = self.scales * (0.4 + 0.06 * rows + 0.12 * (self.reading.activation == "sigmoid"))
        return rows * (self.size[1] + title) + key + scale + (0.25 if self.heading() else 0.05)

    scales = True  # whether there is a colour bar

    def _columns(self, entries: Sequence[tuple[str, str]], width: float) -> int:
        longest = max(cell_len(label) for _, label in entries)
        return int(max(1, min(len(entries), width // (0.06 * longest + 0.42), 4)))

    def key(self, part: SubFigure, note: str) -> None:
        """The heading, and a legend of colours and labels below the panels."""
        from matplotlib.patches import Patch as Swatch

        if self.heading():
            part.suptitle(self.heading(), fontsize=_TEXT, parse_math=False, family=self.fonts)
        entries = self.entries()
        if not entries:
            return
        swatches = [Swatch(facecolor=shade, label=str(i)) for i, (shade, _) in enumerate(entries)]
        whole = part.get_figure(root=True)
        assert whole is not None
        legend = part.legend(
            handles=swatches,
            loc="outside lower center",
            ncols=self._columns(entries, float(whole.get_size_inches()[0])),
            fontsize=_SMALL,
            frameon=False,
            title=note,
            title_fontproperties={"size": _SMALL, "family": self.fonts},
            handlelength=1.2,
            columnspacing=1.2,
        )
        legend.get_title().set_parse_math(False)
        for text, (_, label) in zip(legend.get_texts(), entries, strict=True):
            text.set_parse_math(False)
            text.set_text(label)  # only now: Matplotlib drops labels that begin with "_"
            text.set_fontfamily(self.fonts)


class _Patches(_Block):
    """Patches coloured by their top label, or by the probability of a target."""

    def __init__(
        self,
        reading: Reading,
        n: int,
        fonts: Sequence[str],
        picture: Picture,
        target: int | None,
        patches: Sequence[Patch],
        name: str,
    ) -> None:
        super().__init__(reading, n, fonts, picture, target)
        self.grid, self.patches, self.name = picture.grid, patches, name
        self.slots = [patch.slot for patch in patches]
        self.image = 0.3 + 0.7 * _grey(self.image)  # so that a hue can only come from the overlay
        self.answer = pictures.answer(reading.prompts[n])
        ids = reading.arrays["top_id"][n, :, :, 0]
        shown = pictures.thinned(len(reading.sites), _PANELS)
        first = int(ids[-1, self.answer])
        counted = ids[shown][:, self.slots]
        chosen = pictures.frequent(counted.ravel().tolist(), len(colour.CATEGORIES), [first])
        self.colours = dict(zip(chosen, colour.CATEGORIES, strict=False))
        self.rest = len({int(i) for i in counted.ravel()} - {-1} - self.colours.keys())
        self.most = self._most(shown)

    def entries(self) -> list[tuple[str, str]]:
        """The labels with a colour of their own, and how many have none."""
        if self.target is not None:
            return []
        return _entries({label: self._name(label) for label in self.colours}, self.colours, self.rest)

    def heading(self) -> str:
        """Which picture, and which target."""
        return ": ".join(
            filter(None, (self.name, f"probability of {self._target()}" if self.target is not None else ""))
        )

    def said(self, site: int, most: int) -> str:
        """The answer there, or what it gives the target."""
        arrays, where = self.reading.arrays, (self.n, site, self.answer)
        if self.target is not None:
            chance = float(np.exp(arrays["target_logprob"][where][self.target]))
            return f"p {_number(chance)}, rank {arrays['target_rank'][where][self.target]:,}"
        label = cell_label(self.reading, int(arrays["top_id"][where][0]), self.n, self.answer)
        return f"{cut(label, min(_LABEL, most - 5))} {np.exp(arrays['top_logprob'][where][0]):.2f}"

    def _most(self, shown: Sequence[int]) -> float:
        if self.target is None:
            return 1.0
        values = np.exp(self.reading.arrays["target_logprob"][self.n, shown][:, self.slots, self.target])
        most = float(np.nanmax(np.append(values, 0.0)))
        return most if most > 0 else 1.0

    def panel(self, axes: Axes, site: int, title: str) -> None:
        """The picture without colours under one coloured rectangle for every patch."""
        self.picture(axes, self.image, title)
        rows, columns = self.grid
        over = np.zeros((rows, columns, 4))
        for patch in self.patches:
            over[patch.row, patch.column] = self._shade(site, patch.slot)
        axes.imshow(over, extent=(0, 1, 1, 0), aspect=axes.get_aspect(), interpolation="nearest")

    def _shade(self, site: int, slot: int) -> tuple[float, ...]:
        from matplotlib.colors import to_rgb

        arrays, where = self.reading.arrays, (self.n, site, slot)
        if self.target is not None:
            value = float(np.exp(arrays["target_logprob"][where][self.target]))
            return (0.0, 0.0, 0.0, 0.0) if np.isnan(value) else (*_scale()(value / self.most)[:3], _EVEN)
        value, label = float(np.exp(arrays["top_logprob"][where][0])), int(arrays["top_id"][where][0])
        if np.isnan(value):
            return 0.0, 0.0, 0.0, 0.0
        return (*to_rgb(self.colours.get(label, colour.OTHERS)), _FAINT + (_STRONG - _FAINT) * value)

    def legend(self, part: SubFigure, axes: Sequence[Axes], sites: Sequence[int]) -> None:
        """The labels of the colours and a ramp of the opacities, or the scale of the target."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, Normalize

        reading = self.reading
        independent = reading.activation == "sigmoid"
        if self.target is None:
            grey = (0.25, 0.25, 0.25)
            shades = LinearSegmentedColormap.from_list("opacity", [(*grey, _FAINT), (*grey, _STRONG)])
            text, most = f"opacity: probability of the top {noun(reading)}", 1.0
        else:
            shades, most = _scale(), self.most
            text = f"probability of {self._target()}"
        bar = part.colorbar(
            ScalarMappable(Normalize(0, most), shades),
            ax=list(axes),
            location="bottom",
            fraction=0.05,
            shrink=0.5,
            aspect=40,
            pad=0.02,
            alpha=None if self.target is None else _EVEN,
        )
        bar.ax.tick_params(labelsize=_SMALL)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        note = f"{text}\n{pictures.INDEPENDENT}" if independent else text
        bar.set_label(note, fontsize=_SMALL, parse_math=False, family=self.fonts)
        self.key(part, f"top {noun(reading)} of a patch")

    def _target(self) -> str:
        assert self.target is not None
        return cut(visible(self.reading.targets[self.target].token, space=self.space))

    def _name(self, label: int) -> str:
        return cut(visible(self.reading.labels.get(label, f"[{label}]"), space=self.space))


class _Boxes(_Block):
    """Boxes of the queries that saw something."""

    def __init__(
        self, reading: Reading, n: int, fonts: Sequence[str], picture: Picture | None, target: int | None
    ) -> None:
        super().__init__(reading, n, fonts, picture, target)
        self.size = (self.size[0] * 1.3, self.size[1] * 1.3)
        shown = pictures.thinned(len(reading.sites), _PANELS)
        self.found = {s: pictures.detections(reading, n, s, target) for s in shown}
        drawn = [d.column for s in reversed(shown) for d in self._chosen(s)[0]]
        self.names = {d.column: d.label for found in self.found.values() for d in found}
        self.colours = dict(zip(pictures.frequent(drawn, len(colour.CATEGORIES)), colour.CATEGORIES, strict=False))
        self.rest = len(set(drawn) - self.colours.keys())

    scales = False

    def entries(self) -> list[tuple[str, str]]:
        """The classes with a colour of their own, and how many have none."""
        names = {column: cut(visible(self.names[column], space=self.space)) for column in self.colours}
        return _entries(names, self.colours, self.rest)

    def heading(self) -> str:
        """Which target."""
        if self.target is None:
            return ""
        return f"probability of {cut(visible(self.reading.targets[self.target].token, space=self.space))}"

    def said(self, site: int, most: int) -> str:
        """How many boxes there are."""
        chosen, passed = self._chosen(site)
        return f"{len(chosen) if passed else 'none'} above {pictures.THRESHOLD}"

    def _chosen(self, site: int) -> tuple[list[Detection], bool]:
        """The detections to draw, and whether they pass the threshold."""
        found = self.found[site]
        above = [d for d in found if d.probability > pictures.THRESHOLD]
        return (above, True) if above else (found[: pictures.FEWEST], False)

    def panel(self, axes: Axes, site: int, title: str) -> None:
        """The picture with the boxes; dashed where no query passes the threshold."""
        from matplotlib.patches import Rectangle

        chosen, passed = self._chosen(site)
        self.picture(axes, self.image, title)
        written: list[tuple[float, float, float]] = []
        # The most probable ones last, on top of the others.
        for d in sorted(chosen, key=lambda d: d.probability):
            x, y, w, h = d.box
            shade = self.colours.get(d.column, colour.OTHERS)
            axes.add_patch(
                Rectangle((x - w / 2, y - h / 2), w, h, fill=False, edgecolor=shade, lw=1.1, ls="-" if passed else "--")
            )
        for d in chosen:
            self._write(axes, d, written)

    def _write(self, axes: Axes, d: Detection, written: list[tuple[float, float, float]]) -> None:
        """The label at the upper left corner of its box, or further down where another one is; not where none fits."""
        x, y, w, h = d.box
        text = f"{cut(visible(d.label, space=self.space), 14)} {d.probability:.2f}"
        line, long = 0.105 / self.size[1], (0.052 * cell_len(text) + 0.05) / self.size[0]
        left = min(max(x - w / 2, 0.0), max(1 - long, 0.0))
        top = min(max(y - h / 2, 0.0), 1 - line)
        while any(abs(top - other) < line and left < end and left + long > start for other, start, end in written):
            top += line
        if top > 1 - line + 1e-6:
            return
        written.append((top, left, left + long))
        shade = self.colours.get(d.column, colour.OTHERS)
        axes.text(
            left,
            top,
            text,
            fontsize=5.5,
            family=self.fonts,
            va="top",
            ha="left",
            color=_ink(shade),
            parse_math=False,
            clip_on=True,
            bbox={"facecolor": shade, "edgecolor": "none", "pad": 0.6},
        )

    def legend(self, part: SubFigure, axes: Sequence[Axes], sites: Sequence[int]) -> None:
        """The classes of the colours."""
        notes = [f"a query's {'best class and its' if self.target is None else 'box and its'} probability"]
        if any(not self._chosen(s)[1] for s in sites):
            notes.append(f"dashed: the {pictures.FEWEST} best where none is above {pictures.THRESHOLD}")
        note = "; ".join(notes)
        if self.reading.activation == "sigmoid":
            note += f"\n{pictures.INDEPENDENT}"
        self.key(part, note)


def _entries(names: Mapping[int, str], colours: Mapping[int, str], rest: int) -> list[tuple[str, str]]:
    found = [(shade, names[label]) for label, shade in colours.items()]
    return [*found, (colour.OTHERS, f"{rest} other{'s' if rest > 1 else ''}")] if rest else found


def cut(label: str, most: int = _LABEL) -> str:
    """A label in at most so many columns."""
    return label if cell_len(label) <= most else set_cell_size(label, most - 1).rstrip() + "…"


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 0.005 or value == 0 else f"{value:.0e}"


def _scale() -> Colormap:
    from matplotlib.colors import ListedColormap

    return ListedColormap([back for back, _ in colour.table()])


def _ink(shade: str) -> str:
    red, green, blue = (int(shade[i : i + 2], 16) for i in (1, 3, 5))
    light = colour.luminance((red, green, blue))
    return "#000000" if (light + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def _grey(image: Image) -> Image:
    return image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114])


def _decoded(picture: Picture | None, n: int) -> Image:
    """Pixels from 0 to 1, [height, width] or [height, width, 3]; what is transparent becomes white."""
    if picture is None:
        return np.full((8, 8), 0.93)
    from matplotlib.image import imread

    try:
        image = np.asarray(imread(io.BytesIO(picture.png), format="png"), dtype=np.float64)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"the picture of prompt {n} cannot be drawn: it is not a PNG that can be decoded") from error
    if image.ndim == 3 and image.shape[2] in (2, 4):
        alpha = image[..., -1:]
        image = image[..., :-1] * alpha + 1 - alpha
    return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
