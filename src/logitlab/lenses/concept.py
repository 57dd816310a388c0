"""The concept lens: decode hidden states against vectors of one's own instead of the vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from logitlab.errors import InputError
from logitlab.lenses.base import Lens
from logitlab.logits import Head
from logitlab.models.handle import Model
from logitlab.models.sites import Site
from logitlab.models.vocabulary import ColumnLabels


class ConceptLens:
    """Columns are vectors that a user brings, and what is read is a distribution over them.

    A vector stands where a row of the unembedding stands: the logit of a concept is the product of its vector with the
    hidden state behind the model's own final norm, with the model's own scale and soft-cap. With the rows of a few
    tokens it is the logit lens restricted to them, but for a bias that the head may have. KL and entropy are those of
    the distribution over the concepts.

    Args:
        vectors: [concepts, width], two or more; or a mapping of names to vectors [width].
        names: of the concepts, if ``vectors`` is no mapping.
        lens: a lens that maps the state before it is decoded, for instance a fitted one.

    Raises:
        InputError: shapes and names do not fit, or a value is not finite.

    Example:
        ``read(model, "I am glad", lens=ConceptLens({"joy": joy, "fear": fear}))``
    """

    def __init__(
        self,
        vectors: torch.Tensor | Mapping[str, torch.Tensor],
        names: Sequence[str] | None = None,
        *,
        lens: Lens | None = None,
    ) -> None:
        if isinstance(vectors, Mapping):
            if names is not None:
                raise InputError("the concepts have names already, as keys of the mapping: leave names out")
            names = list(vectors)
            sizes = {tuple(v.shape) for v in vectors.values()}
            if len(sizes) > 1:
                raise InputError(f"the concepts' vectors have different shapes: {', '.join(map(str, sorted(sizes)))}")
            vectors = torch.stack(list(vectors.values())) if vectors else torch.empty(0, 0)
        if vectors.ndim != 2 or len(vectors) < 2:
            raise InputError(f"the vectors have shape {tuple(vectors.shape)}; give [concepts, width], at least two")
        names = [f"concept {i}" for i in range(len(vectors))] if names is None else [str(n) for n in names]
        if len(names) != len(vectors) or len(set(names)) < len(names):
            raise InputError(f"there are {len(vectors)} vectors and {len(set(names))} different names for them")
        if not bool(torch.isfinite(vectors).all()):
            raise InputError("the vectors are not finite: some values are NaN or infinite")
        self.vectors = vectors.detach().float().contiguous()
        self.columns = ColumnLabels(names)
        self.lens = lens

    @property
    def name(self) -> str:
        """What the lens is called in readings."""
        return "concept lens"

    def check(self, model: Model, sites: list[Site]) -> None:
        """Raise `InputError` if the vectors are of another width, or the model has no final norm and head to share."""
        head = model.tail.head
        if head is None:
            raise InputError(f"{model.name} has no linear head whose place the concepts could take")
        width = head.weight.shape[1]
        if self.vectors.shape[1] != width:
            raise InputError(f"the concepts have width {self.vectors.shape[1]}; the head of {model.name} {width}")
        if self.lens is not None:
            self.lens.check(model, sites)

    def transport(self, hidden: torch.Tensor, site: Site) -> torch.Tensor:
        """Hidden states, unchanged, or behind the lens that was given."""
        return hidden if self.lens is None else self.lens.transport(hidden, site)

    def source(self, model: Model) -> Head:
        """The head that takes the place of the model's."""
        head = model.tail.head
        assert head is not None  # `check` has asked
        return Head(self.vectors.to(head.weight.device), scale=head.scale, softcap=head.softcap)

    def describe(self) -> dict[str, Any]:
        """Plain values for the provenance of a reading."""
        digest = hashlib.sha256(self.vectors.cpu().numpy().tobytes()).hexdigest()[:16]
        found = {"name": self.name, "concepts": self.columns.names, "digest": digest}
        return found | ({} if self.lens is None else {"behind": self.lens.describe()})
