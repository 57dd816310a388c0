"""Sweeps: what lenses say over a whole corpus, in bounded memory, on one machine or many."""

from logitlab.sweeps.report import Measure, SweepReport
from logitlab.sweeps.run import Progress, sweep

__all__ = ["Measure", "Progress", "SweepReport", "sweep"]
