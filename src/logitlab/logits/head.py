"""What turns decoded rows into logits: a linear head with its post-map, or the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F

from logitlab.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Head:
    """The fast form of a model's last step: ``y = postmap(x @ weight.T + bias) + offset``.

    ``postmap(z)`` is ``scale * z``, or ``softcap * tanh(scale * z / softcap)`` when a cap is set
    (Gemma 2). The numbers are measured on the loaded model and proved, see `logitlab.models.tail`.

    Attributes:
        weight: [V, d], the head's own parameter, not a copy.
        bias: [V] or None, added before the post-map.
        scale: slope of the post-map at zero.
        softcap: bound that the post-map tends to, or None.
        offset: [V] or None, added after the post-map (BART's ``final_logits_bias``).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    offset: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together; a compiled kernel would read beyond them."""
        if self.weight.ndim != 2:
            raise InputError(f"a head's weight has shape {tuple(self.weight.shape)}; give [vocabulary, width]")
        for name, given in (("bias", self.bias), ("offset", self.offset)):
            if given is not None and given.shape != self.weight.shape[:1]:
                raise InputError(
                    f"a head's {name} has shape {tuple(given.shape)}; give one number for each of the"
                    f" {self.weight.shape[0]} rows of its weight"
                )

    @property
    def vocab_size(self) -> int:
        """Number of columns V."""
        return int(self.weight.shape[0])

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives, kept under ``name`` until the weight changes."""
        w = self.weight
        state = (w.data_ptr(), None if w.is_inference() else w._version)
        if self.__dict__.get("_state") != state:
            self.__dict__.update(_state=state, _kept={})
        found = self.__dict__["_kept"]
        if name not in found:
            found[name] = make()
        return found[name]

    @property
    def row_sizes(self) -> torch.Tensor:
        """Euclidean norm of every row of ``weight``, [V] float32."""
        return self.kept(
            "row_sizes", lambda: torch.cat([w.double().norm(dim=1) for w in self.weight.split(2**12)]).float()
        )

    @property
    def largest_row(self) -> float:
        """Largest finite Euclidean norm of a row of ``weight``."""
        return self.kept("largest_row", lambda: largest_finite(self.row_sizes))

    @property
    def ruled_out(self) -> torch.Tensor | None:
        """[V] bool, columns whose logit is -inf whatever the row is: by the offset, or by a bias that no cap bounds."""
        found: torch.Tensor | None = None if self.offset is None else self.offset == -torch.inf
        if self.bias is not None and self.softcap is None:
            by_bias = self.bias * self.scale == -torch.inf
            found = by_bias if found is None else found | by_bias.to(found.device)
        return found

    @property
    def extra_error(self) -> float:
        """Rounding error that bias, soft-cap and offset can add to a float32 logit."""
        bias, offset = (0.0 if t is None else largest_finite(t) for t in (self.bias, self.offset))
        return 2.0**-22 * (abs(self.scale) * bias + offset + 2 * abs(self.softcap or 0.0))

    def postmap(self, z: torch.Tensor) -> torch.Tensor:
        """Scale and soft-cap ``z`` (any shape); the offset is not added."""
        if self.softcap is not None:
            return torch.tanh(z * (self.scale / self.softcap)) * self.softcap
        return z if self.scale == 1.0 else z * self.scale

    def logits(
        self, x: torch.Tensor, columns: slice | torch.Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Logits [n, columns] of rows ``x`` [n, d], computed in ``dtype``."""
        pick = slice(None) if columns is None else columns
        bias = None if self.bias is None else self.bias[pick].to(dtype)
        y = self.postmap(F.linear(x.to(dtype), self.weight[pick].to(dtype), bias))
        return y if self.offset is None else y + self.offset[pick].to(dtype)

    def logits_at(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Float64 logits of chosen columns: rows ``x`` [n, d], ``ids`` [n, m] -> [n, m].

        Each product is summed in the same order whatever the ids are, so equal head rows give
        equal logits: ties stay ties on every device.
        """
        weight = self.weight[ids].double()
        z = (weight * x.double().unsqueeze(1)).sum(-1)
        if self.bias is not None:
            z = z + self.bias[ids].double()
        y = self.postmap(z)
        return y if self.offset is None else y + self.offset[ids].double()


@dataclass(frozen=True)
class LogitSource:
    """A tail without a proven fast form: a function from rows [n, d] to logits [n, V]."""

    compute: Callable[[torch.Tensor], torch.Tensor]
    vocab_size: int


def largest_finite(t: torch.Tensor) -> float:
    """Largest finite absolute value; 0.0 if there is none (an offset of -inf rules a token out)."""
    size = t.float().abs()
    return float(size.where(torch.isfinite(size), 0.0).max()) if t.numel() else 0.0
