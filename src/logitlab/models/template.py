"""The few tokens that logitlab runs through a model to find its parts and to prove them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from logitlab.errors import ModelError

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
    """Token ids for one verification pass, and the shape of inputs for short-circuited passes.

    Attributes:
        ids: token ids of the sequence that is decoded, shape [1, `DECODER_TOKENS`].
        encoder_ids: token ids for the encoder of an encoder-decoder model, shape
            [1, `ENCODER_TOKENS`]; None for every other model.
        options: keyword arguments passed on to the forward pass unchanged.
    """

    ids: torch.Tensor
    encoder_ids: torch.Tensor | None
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @staticmethod
    def of(module: nn.Module) -> Template:
        """Draw the template of a model: fixed pseudo-random ids, no special tokens among them.

        Raises:
            ModelError: the model does not take token ids.
        """
        parameters = forward_parameters(module)
        if "input_ids" not in parameters:
            taken = [name for name in parameters if name not in ("self", "kwargs", "args")][:3]
            raise ModelError(
                f"{type(module).__name__} takes {', '.join(taken) or 'no named input'}, not input_ids: "
                "logitlab reads models of token ids so far"
            )
        config: Any = getattr(module, "config", None)
        size = _vocabulary_size(module)
        avoid = {
            value
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "mask_token_id")
            for value in _as_list(getattr(config, name, None))
        }
        generator = torch.Generator().manual_seed(20260)
        pool = [int(i) for i in torch.randint(0, size, (256,), generator=generator) if int(i) not in avoid]
        ids = pool[: DECODER_TOKENS + ENCODER_TOKENS]
        ids += [0] * (DECODER_TOKENS + ENCODER_TOKENS - len(ids))
        device = device_of(module)
        both = torch.tensor([ids], device=device)
        encoder = both[:, DECODER_TOKENS:] if getattr(config, "is_encoder_decoder", False) else None
        return Template(both[:, :DECODER_TOKENS], encoder, quiet_options(module))

    def full(self) -> dict[str, Any]:
        """Inputs of the verification pass."""
        if self.encoder_ids is None:
            return {"input_ids": self.ids, **self.options}
        return {"input_ids": self.encoder_ids, "decoder_input_ids": self.ids, **self.options}

    def rows(self, n: int) -> dict[str, Any]:
        """Inputs for a short-circuited pass over ``n`` rows: ``n`` sequences of one token each."""
        ids = self.ids[:, :1].expand(n, 1)
        if self.encoder_ids is None:
            return {"input_ids": ids, **self.options}
        return {"input_ids": self.encoder_ids[:, :1].expand(n, 1), "decoder_input_ids": ids, **self.options}


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def _vocabulary_size(module: nn.Module) -> int:
    embedding: Any = getattr(module, "get_input_embeddings", lambda: None)()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None and getattr(embedding, "weight", None) is not None:
        rows = embedding.weight.shape[0]
    if rows is None:
        config: Any = getattr(module, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        rows = getattr(text, "vocab_size", None)
    if rows is None:
        raise ModelError(f"{type(module).__name__} has no input embedding and its config names no vocab_size")
    return int(rows)
