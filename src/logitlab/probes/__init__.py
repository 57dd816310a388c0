"""Probes: trained decoders with the controls that say what their accuracy means, and similarity of states."""

from logitlab.probes.curve import probe, probe_states
from logitlab.probes.kinds import KINDS, fit_probe
from logitlab.probes.linear import LinearProbe, Regression, fit_regression
from logitlab.probes.moments import Moments
from logitlab.probes.probe import Probe
from logitlab.probes.report import ProbeReport
from logitlab.probes.separability import Separability, separability
from logitlab.probes.similarity import StreamedCKA, cka, similarity

__all__ = [
    "KINDS",
    "LinearProbe",
    "Moments",
    "Probe",
    "ProbeReport",
    "Regression",
    "Separability",
    "StreamedCKA",
    "cka",
    "fit_probe",
    "fit_regression",
    "probe",
    "probe_states",
    "separability",
    "similarity",
]
