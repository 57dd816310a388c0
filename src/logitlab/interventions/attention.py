"""Attention edges that are cut: some tokens may not look at some others.

Nothing of a model's code is touched. While a block runs, PyTorch's own attention and softmax functions are watched; the
scores of edges that are cut become -inf before the softmax, so that what is left is renormalised.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from logitlab.errors import InputError, ModelError
from logitlab.interventions.positions import Positions, Tokens, chosen, parse
from logitlab.models.handle import Model
from logitlab.models.hooks import Taps
from logitlab.models.inputs import whole_number

_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)


@dataclass(frozen=True)
class Cut:
    """Edges of attention that are cut; made by `cut`.

    Attributes:
        queries: which tokens may not look.
        keys: at which tokens.
        layers: in which layers; None for all.
        heads: of which heads; None for all.
    """

    queries: str | slice | tuple[int, ...]
    keys: str | slice | tuple[int, ...]
    layers: tuple[int, ...] | None
    heads: tuple[int, ...] | None

    def describe(self) -> dict[str, Any]:
        """Plain values for the provenance of a reading."""

        def plain(value: Any) -> Any:
            return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, slice) else value

        return {"change": "cut", **{name: plain(value) for name, value in vars(self).items()}}


def cut(
    queries: Positions,
    keys: Positions,
    *,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
) -> Cut:
    """Cut attention edges: no token of ``queries`` may look at any of ``keys``.

    Args:
        queries: see `logitlab.interventions.positions.parse`.
        keys: the same.
        layers: in which layers, by default all; negative numbers count from the end.
        heads: of which heads, by default all.

    Raises:
        InputError: an argument cannot be used.

    Example:
        ``with intervene(model, cut("last", [2, 3], layers=range(4, 9))): ...``
    """
    return Cut(parse(queries), parse(keys), _numbers(layers, "layer"), _numbers(heads, "head"))


def _numbers(given: int | Sequence[int] | None, what: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    many = tuple(whole_number(n, what) for n in (given if isinstance(given, Sequence | range) else [given]))
    if not many:
        raise InputError(f"no {what} is named: leave {what}s out for all of them")
    return many


class Cutter:
    """Cuts edges in the passes of one model.

    Args:
        model: the model.
        cuts: what is cut.
        tokens: tells of a pass what its tokens are.
        active: whether this context's passes are meant.

    Raises:
        InputError: a layer does not exist.
    """

    def __init__(
        self,
        model: Model,
        cuts: Sequence[Cut],
        tokens: Callable[[int, int, torch.device], Tokens],
        active: Callable[[], bool],
    ) -> None:
        self.model, self.tokens, self.active = model, tokens, active
        self.of_layer: dict[int, list[Cut]] = defaultdict(list)
        for item in cuts:
            for layer in range(model.n_layers) if item.layers is None else item.layers:
                if not -model.n_layers <= layer < model.n_layers:
                    raise InputError(
                        f"layer {layer} is out of range: this stack has {model.n_layers} layers (0 to "
                        f"{model.n_layers - 1}, or -1 to -{model.n_layers})"
                    )
                self.of_layer[layer % model.n_layers].append(item)

    def attach(self, taps: Taps) -> None:
        """Watch the blocks."""
        by_module: dict[int, list[int]] = defaultdict(list)
        for layer in range(self.model.n_layers):
            by_module[id(self.model.stack.blocks[layer].module)].append(layer)
        for layers in by_module.values():
            if not any(layer in self.of_layer for layer in layers):
                continue
            if len(layers) > 1:
                raise InputError(f"{self.model.name} uses one block for several layers: its attention cannot be cut")
            (layer,) = layers
            block = self.model.stack.blocks[layer].module
            taps.around(block, self._watching(_Scores(self, layer)))

    def _watching(self, mode: _Scores) -> Callable[..., Any]:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self.active():
                return forward(*args, **kwargs)
            mode.begin()
            with mode:
                output = forward(*args, **kwargs)
            if not mode.seen:
                raise ModelError(
                    f"layer {mode.layer} of {self.model.name} has no attention that could be cut: none that PyTorch's "
                    "own functions compute (load the model with attn_implementation='eager')"
                )
            return output

        return around

    def keep(self, layer: int, batch: int, queries: int, keys: int, device: torch.device) -> torch.Tensor:
        """Which edges stay, [batch, heads or 1, queries, keys] bool."""
        tokens = self.tokens(batch, queries, device)
        every = Tokens(tokens.every, tokens.prompt, tokens.every)
        if every.number.shape[1] != keys:
            raise ModelError(
                f"the attention of layer {layer} has {keys} keys for {every.number.shape[1]} tokens, as with a window: "
                "edges cannot be cut"
            )
        gone: torch.Tensor | None = None
        heads = self._heads(layer)
        for item in self.of_layer[layer]:
            edges = (chosen(item.queries, tokens) >= 0).unsqueeze(2) & (chosen(item.keys, every) >= 0).unsqueeze(1)
            part = edges.unsqueeze(1)
            if item.heads is not None:
                bad = next((h for h in item.heads if not 0 <= h < heads), None)
                if bad is not None:
                    raise InputError(f"head {bad} does not exist: layer {layer} has {heads} (0 to {heads - 1})")
                which = torch.zeros(1, heads, 1, 1, dtype=torch.bool, device=device)
                which[0, list(item.heads)] = True
                part = part & which
            gone = part if gone is None else gone | part
        assert gone is not None
        return ~gone

    def _heads(self, layer: int) -> int:
        part = self.model.parts[layer].heads
        if part is not None:
            return part.parts
        config: Any = getattr(self.model.module, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in ("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads"):
            if isinstance(found := getattr(text, name, None), int):
                return found
        raise InputError(f"how many heads layer {layer} of {self.model.name} has is not known: cut all of them")


class _Scores(TorchFunctionMode):
    """Exchanges the scores of one block's own attention."""

    def __init__(self, cutter: Cutter, layer: int) -> None:
        super().__init__()
        self.cutter, self.layer = cutter, layer
        self.seen = False

    def begin(self) -> None:
        """A call of the block begins: its attention has not been seen yet."""
        self.seen = False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            if self._is_first():
                return self._attention(func, list(args), kwargs)
        elif func in _SOFTMAX:
            given = list(args) if args else [kwargs.pop("input")]
            dim = kwargs.get("dim", given[1] if len(given) > 1 else None)
            if isinstance(given[0], torch.Tensor) and given[0].ndim == 4 and dim in (-1, 3) and self._is_first():
                return self._softmax(func, given, kwargs)
            return func(*given, **kwargs)
        return func(*args, **kwargs)

    def _is_first(self) -> bool:
        """Whether this is the block's own attention; what comes later in a decoder's is attention to the encoder.

        Raises:
            ModelError: there is another one where there is no encoder.
        """
        if self.seen and not self.cutter.model.encoder_decoder:
            raise ModelError(
                f"layer {self.layer} of {self.cutter.model.name} attends more than once: its edges cannot be cut"
            )
        return not self.seen

    def _softmax(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        scores = args[0]
        self.seen = True
        stays = self.cutter.keep(self.layer, scores.shape[0], scores.shape[2], scores.shape[3], scores.device)
        cut = scores.masked_fill(~stays, -torch.inf)
        _check_left(
            cut.detach() > torch.finfo(scores.dtype).min / 2, scores.detach() > torch.finfo(scores.dtype).min / 2
        )
        args[0] = cut
        return func(*args, **kwargs)

    def _attention(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, mask = given["query"], given["key"], given.get("attn_mask")
        self.seen = True
        (batch, _, queries, _), keys = query.shape, key.shape[-2]
        stays = self.cutter.keep(self.layer, batch, queries, keys, query.device)
        if given.get("is_causal"):
            seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(0)
        else:
            seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        bias = torch.zeros(1, dtype=query.dtype, device=query.device)
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        elif mask is not None:
            bias, seen = mask, seen & (mask > torch.finfo(mask.dtype).min / 2)
        left = seen & stays
        _check_left(left, seen)
        # Rows that saw nothing before (padding) keep what they had: whatever that is, nobody reads it.
        blank = ~seen.any(-1, keepdim=True)
        given["attn_mask"] = torch.where(left | blank, bias.to(query.dtype), -torch.inf).to(query.dtype)
        given["is_causal"] = False
        first = [given.pop(name) for name in names[:3]]
        return func(*first, **given)


def _check_left(left: torch.Tensor, seen: torch.Tensor) -> None:
    """Raise `InputError` if a token that looked at something has nothing left to look at."""
    if bool((seen.any(-1) & ~left.any(-1)).any()):
        raise InputError(
            "a token would have nothing left to look at: leave it at least one edge (a token may look at itself)"
        )
