"""logitlab reads language models through their logits.

Names are imported when they are first used, so ``import logitlab`` is quick and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitlab.comparison import Comparison as Comparison
    from logitlab.comparison import compare as compare
    from logitlab.errors import InputError as InputError
    from logitlab.errors import LogitlabError as LogitlabError
    from logitlab.errors import ModelError as ModelError
    from logitlab.errors import OutOfMemoryError as OutOfMemoryError
    from logitlab.errors import VerificationError as VerificationError
    from logitlab.generation import Step as Step
    from logitlab.generation import generate as generate
    from logitlab.interventions import Intervention as Intervention
    from logitlab.interventions import Vectors as Vectors
    from logitlab.interventions import intervene as intervene
    from logitlab.lenses import ConceptLens as ConceptLens
    from logitlab.lenses import FittedLens as FittedLens
    from logitlab.lenses import Lens as Lens
    from logitlab.lenses import LogitLens as LogitLens
    from logitlab.lenses import PatchscopeLens as PatchscopeLens
    from logitlab.lenses import load_lens as load_lens
    from logitlab.lenses.fit import fit as fit
    from logitlab.lenses.jacobian import fit_jacobian as fit_jacobian
    from logitlab.logits import Statistics as Statistics
    from logitlab.models.capture import Activations as Activations
    from logitlab.models.capture import capture as capture
    from logitlab.models.handle import Model as Model
    from logitlab.models.handle import wrap as wrap
    from logitlab.models.load import load as load
    from logitlab.models.sites import Site as Site
    from logitlab.models.verify import Verification as Verification
    from logitlab.probes.curve import probe as probe
    from logitlab.probes.report import ProbeReport as ProbeReport
    from logitlab.reader import decode as decode
    from logitlab.reader import read as read
    from logitlab.reading import Reading as Reading
    from logitlab.sweeps import SweepReport as SweepReport
    from logitlab.sweeps import sweep as sweep

__version__ = "0.1.0"

_HOME = {
    "Activations": "models.capture",
    "Comparison": "comparison",
    "ConceptLens": "lenses",
    "FittedLens": "lenses",
    "InputError": "errors",
    "Intervention": "interventions",
    "Lens": "lenses",
    "LogitLens": "lenses",
    "LogitlabError": "errors",
    "Model": "models.handle",
    "ModelError": "errors",
    "OutOfMemoryError": "errors",
    "PatchscopeLens": "lenses",
    "ProbeReport": "probes.report",
    "Reading": "reading",
    "Site": "models.sites",
    "Statistics": "logits",
    "Step": "generation",
    "SweepReport": "sweeps",
    "Vectors": "interventions",
    "Verification": "models.verify",
    "VerificationError": "errors",
    "capture": "models.capture",
    "compare": "comparison",
    "decode": "reader",
    "fit": "lenses.fit",
    "fit_jacobian": "lenses.jacobian",
    "generate": "generation",
    "intervene": "interventions",
    "load": "models.load",
    "load_lens": "lenses",
    "probe": "probes.curve",
    "read": "reader",
    "sweep": "sweeps",
    "wrap": "models.handle",
}

__all__ = [
    "Activations",
    "Comparison",
    "ConceptLens",
    "FittedLens",
    "InputError",
    "Intervention",
    "Lens",
    "LogitLens",
    "LogitlabError",
    "Model",
    "ModelError",
    "OutOfMemoryError",
    "PatchscopeLens",
    "ProbeReport",
    "Reading",
    "Site",
    "Statistics",
    "Step",
    "SweepReport",
    "Vectors",
    "Verification",
    "VerificationError",
    "capture",
    "compare",
    "decode",
    "fit",
    "fit_jacobian",
    "generate",
    "intervene",
    "load",
    "load_lens",
    "probe",
    "read",
    "sweep",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'logitlab' has no attribute {name!r}")
    value = getattr(import_module(f"logitlab.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
