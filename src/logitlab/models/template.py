"""The small inputs that logitlab runs through a model to find its parts and to prove them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

DECODER_TOKENS = 7
ENCODER_TOKENS = 5  # not the decoder's number, so that the two can never be mistaken


def forward_parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The named parameters of ``module.forward``."""
    return dict(inspect.signature(type(module).forward).parameters)


def quiet_options(module: nn.Module) -> dict[str, Any]:
    """Keyword arguments that keep a forward pass free of caches and extra outputs, where known."""
    return {"use_cache": False} if "use_cache" in forward_parameters(module) else {}


def device_of(module: nn.Module) -> torch.device:
    """Where inputs have to be: the device of the input embedding, else of the first real parameter."""
    hook = getattr(module, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)  # pyright: ignore[reportOptionalMemberAccess]
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")


@dataclass(frozen=True)
class Template:
    """Inputs of one verification pass, and the shape of inputs for short-circuited passes.

    Attributes:
        inputs: keyword arguments of the pass.
        options: those of them that every forward pass of this model gets (``use_cache=False``).
    """

    inputs: Mapping[str, Any]
    options: Mapping[str, Any]

    @staticmethod
    def of(module: nn.Module, example: Mapping[str, Any] | None = None) -> Template:
        """The template of a model: its caller's example, or inputs made from its signature.

        Raises:
            ModelError: no example is given and the model takes inputs of unknown names.
        """
        from logitlab.models.example import example_inputs

        inputs = dict(example_inputs(module) if example is None else example)
        options = quiet_options(module)
        return Template(inputs | options, options)

    @property
    def tokens(self) -> str | None:
        """Name of the input whose positions are decoded when it is a sequence of token ids, else None."""
        names = ("decoder_input_ids", "input_ids")
        return next((name for name in names if isinstance(self.inputs.get(name), torch.Tensor)), None)

    @property
    def encoder_decoder(self) -> bool:
        """Whether a decoder's token ids go in beside another input."""
        return isinstance(self.inputs.get("decoder_input_ids"), torch.Tensor)

    @property
    def text_only(self) -> bool:
        """Whether nothing but token ids (and masks) goes in."""
        floats = [v for v in self.inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        return self.tokens is not None and not floats

    @property
    def pixels(self) -> bool:
        """Whether a picture goes in, and no text."""
        maps = any(isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim == 4 for v in self.inputs.values())
        return maps and self.tokens is None

    @property
    def lengths(self) -> frozenset[int]:
        """Numbers of tokens in the template's sequences."""
        names = ("decoder_input_ids", "input_ids")
        found = [self.inputs.get(name) for name in names]
        return frozenset(int(t.shape[1]) for t in found if isinstance(t, torch.Tensor) and t.ndim > 1)

    @property
    def described(self) -> str:
        """The inputs in words, for messages."""
        if self.text_only:
            return "a few token ids alone"
        shapes = (f"{k} {list(v.shape)}" for k, v in self.inputs.items() if isinstance(v, torch.Tensor))
        return f"the example {', '.join(shapes)}"

    def full(self) -> dict[str, Any]:
        """Inputs of the verification pass."""
        return dict(self.inputs)

    def rows(self, n: int) -> dict[str, Any] | None:
        """Inputs of a short-circuited pass over ``n`` sequences of one token each; None without tokens."""
        name = self.tokens
        if name is None:
            return None
        length = self.inputs[name].shape[1]

        def shortened(key: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] != 1:
                return value
            # the encoder's sequence keeps its length: its stacks are skipped
            along = value.ndim > 1 and value.shape[1] == length and (not self.encoder_decoder or "decoder" in key)
            part = value[:, :1] if along else value
            return part.expand(n, *part.shape[1:])

        return {key: shortened(key, value) for key, value in self.inputs.items()}
