"""Studies: one paper's system each, runnable on any suitable model, ending in claims that are checked.

To declare a study imports nothing heavy; neither does a list of them. So a module with a study imports torch, pandas
and the like inside of functions.
"""

from logitlab.studies.execute import Result, report, run_study
from logitlab.studies.registry import Entry, entries, find
from logitlab.studies.run import Progress, Run
from logitlab.studies.study import Claim, Finding, Parameter, Picture, Step, Study, Untestable
from logitlab.studies.verdict import Outcome, judge

__all__ = [
    "Claim",
    "Entry",
    "Finding",
    "Outcome",
    "Parameter",
    "Picture",
    "Progress",
    "Result",
    "Run",
    "Step",
    "Study",
    "Untestable",
    "entries",
    "find",
    "judge",
    "report",
    "run_study",
]
