"""At which tokens an intervention works: named places of a prompt, counted over its real tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from logitlab.errors import InputError
from logitlab.models.inputs import whole_number

NAMES = ("all", "first", "last", "prompt", "generated", "each")

Positions = str | int | slice | Sequence[int] | None
"""What a caller may name: see `parse`."""


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens of one pass.

    Attributes:
        number: [batch, tokens] int64, which token of its sequence each is, from 0, padding left out; -1 for padding.
        prompt: [batch] int64, how many tokens the prompt of each sequence has.
        every: [batch, past + tokens] int64, the same as ``number`` of all tokens so far.
    """

    number: torch.Tensor
    prompt: torch.Tensor
    every: torch.Tensor

    @staticmethod
    def of(mask: torch.Tensor, tokens: int, prompt: torch.Tensor | None) -> Tokens:
        """From the mask of all tokens so far, [batch, past + tokens].

        Args:
            mask: 1 where there is a token, 0 where there is padding.
            tokens: how many are in this pass, the last ones.
            prompt: lengths of the prompts; by default all that the mask marks.
        """
        real = mask.bool()
        every = (real.long().cumsum(1) - 1).masked_fill(~real, -1)
        return Tokens(every[:, mask.shape[1] - tokens :], real.sum(1) if prompt is None else prompt, every)

    def to(self, device: torch.device) -> Tokens:
        """The same on a device."""
        return Tokens(self.number.to(device), self.prompt.to(device), self.every.to(device))


def parse(positions: Positions) -> str | slice | tuple[int, ...]:
    """Positions as they are kept.

    Args:
        positions: ``all`` real tokens (also None), the ``first`` token, the ``last`` one of the prompt, the whole
            ``prompt``, ``generated`` tokens, or ``each`` token from which the next one is predicted while a model
            writes: the last one of the prompt and all generated ones. Or token numbers of the prompt, negative ones
            counted from its end, or a slice of them.

    Raises:
        InputError: there is no such name, or something is not a whole number.
    """
    if positions is None:
        return "all"
    if isinstance(positions, str):
        if positions not in NAMES:
            raise InputError(
                f"there are no positions {positions!r}; there are {', '.join(NAMES)}, or numbers of tokens"
            )
        return positions
    if isinstance(positions, slice):
        if positions.step == 0:
            raise InputError("the step of a slice of positions is 0; it must be another whole number")
        return positions
    many = list(positions) if isinstance(positions, Sequence) else [positions]
    if not many:
        raise InputError("no position is named: leave positions out for all of them")
    return tuple(whole_number(p, "position") for p in many)


def chosen(positions: str | slice | tuple[int, ...], tokens: Tokens) -> torch.Tensor:
    """For each token of a pass which of the positions it is, [batch, tokens] int64 from 0; -1 where it is none.

    Raises:
        InputError: a number is beyond the prompt.
    """
    number, prompt = tokens.number, tokens.prompt.unsqueeze(1)
    real = number >= 0
    if isinstance(positions, str):
        found = {
            "all": real,
            "first": number == 0,
            "last": number == prompt - 1,
            "prompt": real & (number < prompt),
            "generated": number >= prompt,
            "each": number >= prompt - 1,
        }[positions]
        return torch.where(found & real, torch.zeros_like(number), -1)
    out = torch.full_like(number, -1)
    for row, length in enumerate(tokens.prompt.tolist()):
        wanted = list(range(length))[positions] if isinstance(positions, slice) else positions
        for slot, position in enumerate(wanted):
            if not -length <= position < length:
                raise InputError(
                    f"position {position} is beyond the prompt, which has {length} tokens (0 to {length - 1}, or -1 to "
                    f"-{length}); tokens that a model writes are positions='generated' or 'each'"
                )
            out[row][number[row] == position % length] = slot
    return out
