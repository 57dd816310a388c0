"""Sites: the places in a layer stack where a tensor can be read, and how they are written.

A site is ``<layer>.<kind>`` with an optional component index, for instance ``12.resid_post`` or
``3.head_out.7``. The kinds follow the field's names:

=================  =====================================================================
``resid_pre``      the hidden state that enters the block
``resid_post``     the hidden state that leaves the block
``attn_out``       what the token mixer (attention, or its stand-in) adds to the residual
``cross_attn_out`` what attention over an encoder adds to the residual
``mlp_out``        what the position-wise part (MLP, mixture of experts) adds
``head_out``       what one attention head adds (its slice of the output projection)
``neuron``         what one MLP neuron adds: its activation times its value vector
=================  =====================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from logitlab.errors import InputError

KINDS = ("resid_pre", "attn_out", "cross_attn_out", "mlp_out", "resid_post", "head_out", "neuron")
"""Every site kind, in the order in which a block computes them (components last)."""

INDEXED_KINDS = ("head_out", "neuron")
"""Kinds that are made of numbered components (heads, neurons)."""

_LAYERS = r"-?\d+|-?\d*:-?\d*(?::\d+)?"
_SPEC = re.compile(rf"^(?:(?P<layers>{_LAYERS})\.)?(?P<kind>[a-z_]+)(?:\.(?P<index>\d+))?$")


@dataclass(frozen=True)
class Site:
    """One place in a layer stack: a layer, a kind, and for heads and neurons which one.

    Example:
        >>> str(Site(3, "head_out", 7))
        '3.head_out.7'
    """

    layer: int
    kind: str
    index: int | None = None

    def __str__(self) -> str:
        tail = "" if self.index is None else f".{self.index}"
        return f"{self.layer}.{self.kind}{tail}"

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key: depth in the stack, then the order inside a block."""
        return (self.layer, KINDS.index(self.kind), -1 if self.index is None else self.index)


@dataclass(frozen=True)
class SiteSpec:
    """A parsed request such as ``::5.resid_post``: layers (None = all), kind, component index."""

    layers: int | slice | None
    kind: str
    index: int | None


def parse_spec(text: str) -> SiteSpec:
    """Parse one site specification.

    Args:
        text: ``<layers>.<kind>[.<index>]``, where ``<layers>`` is a number (negative counts from
            the end), a slice such as ``0:12`` or ``::4``, or absent for all layers.

    Raises:
        InputError: the text is not of that form, or the kind is unknown.

    Example:
        >>> parse_spec("-1.resid_post")
        SiteSpec(layers=-1, kind='resid_post', index=None)
    """
    match = _SPEC.match(text.strip())
    if match is None:
        raise InputError(
            f"site {text!r} is not of the form LAYER.KIND or LAYER.KIND.INDEX "
            f"(for instance 12.resid_post, ::4.mlp_out, 3.head_out.7)"
        )
    kind = match["kind"]
    if kind not in KINDS:
        raise InputError(f"site {text!r}: unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
    index = None if match["index"] is None else int(match["index"])
    if index is not None and kind not in INDEXED_KINDS:
        raise InputError(
            f"site {text!r}: only {' and '.join(INDEXED_KINDS)} take a component index; write {text.rpartition('.')[0]}"
        )
    layers: int | slice | None = None
    if match["layers"] is not None:
        if ":" in match["layers"]:
            parts = [int(p) if p else None for p in match["layers"].split(":")]
            layers = slice(*parts)
            if layers.step == 0:
                raise InputError(f"site {text!r}: the step of a layer slice must be at least 1")
        else:
            layers = int(match["layers"])
    return SiteSpec(layers, kind, index)


def select_layers(spec: SiteSpec, n_layers: int) -> list[int]:
    """The layer numbers that a specification names in a stack of ``n_layers`` blocks.

    Raises:
        InputError: a layer number is outside the stack, or a slice selects nothing.
    """
    if spec.layers is None:
        return list(range(n_layers))
    if isinstance(spec.layers, slice):
        layers = list(range(n_layers))[spec.layers]
        if not layers:
            raise InputError(f"site kind {spec.kind!r}: the layer slice selects nothing (this stack has {n_layers})")
        return layers
    layer = spec.layers + n_layers if spec.layers < 0 else spec.layers
    if not 0 <= layer < n_layers:
        raise InputError(
            f"layer {spec.layers} is out of range: this stack has {n_layers} layers "
            f"(0 to {n_layers - 1}, or -1 to -{n_layers})"
        )
    return [layer]


def normalise_request(sites: str | Site | Iterable[str | Site] | None) -> list[SiteSpec]:
    """Turn what a caller may pass as ``sites`` into a list of specifications.

    ``None`` or ``"resid"`` mean the residual stream: the input of the first block and the output
    of every block. A string may hold several specifications separated by commas.

    Raises:
        InputError: nothing was named, or a specification is malformed.
    """
    if sites is None:
        sites = "resid"
    items: Sequence[str | Site] = [sites] if isinstance(sites, str | Site) else list(sites)
    specs: list[SiteSpec] = []
    for item in items:
        if isinstance(item, Site):
            specs.append(parse_spec(str(item)))
            continue
        for part in filter(None, (p.strip() for p in item.split(","))):
            if part == "resid":
                specs += [SiteSpec(0, "resid_pre", None), SiteSpec(None, "resid_post", None)]
            else:
                specs.append(parse_spec(part))
    if not specs:
        raise InputError("no site was named; leave sites out for the whole residual stream")
    return specs
