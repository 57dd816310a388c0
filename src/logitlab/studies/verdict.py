"""From a finding to a verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from logitlab.studies.study import Claim, Finding

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
UNTESTABLE = "not testable at this scale"
FAILED = "the measure failed"
"""A bug in the study; the error is raised once everything else is written."""


@dataclass(frozen=True)
class Outcome:
    """What became of a claim.

    Attributes:
        claim: the claim.
        verdict: ``reproduced``, ``not reproduced`` or ``not testable at this scale``.
        finding: what was measured, if anything was.
        note: why, where the numbers do not say it.
    """

    claim: Claim
    verdict: str
    finding: Finding | None = None
    note: str = ""

    def record(self) -> dict[str, Any]:
        """Plain values; a number that is not finite is None."""
        found = self.finding
        numbers = (math.nan, math.nan, math.nan) if found is None else (found.value, found.low, found.high)
        value, low, high = (float(v) if math.isfinite(v) else None for v in numbers)
        return {
            "name": self.claim.name,
            "statement": self.claim.statement,
            "paper": self.claim.paper,
            "value": value,
            "low": low,
            "high": high,
            "n": None if found is None else int(found.n),
            "test": self.claim.test,
            "threshold": float(self.claim.threshold),
            "side": self.claim.side,
            "verdict": self.verdict,
            "note": self.note,
        }


def judge(claim: Claim, finding: Finding) -> Outcome:
    """Compare a finding with the claim's threshold.

    The claim is reproduced when the whole 95 % interval lies on the claimed side. An interval that ends on the
    threshold contains it.

    Example:
        ``judge(claim, Finding(0.9, 0.8, 1.0, n=14)).verdict``
    """
    notes = [finding.note] if finding.note else []
    if any(math.isnan(v) for v in (finding.value, finding.low, finding.high)):
        what = "measure" if math.isnan(finding.value) else "interval"
        return Outcome(
            claim, UNTESTABLE, finding, "; ".join([f"the {what} is not a number, of n = {finding.n}", *notes])
        )
    if finding.n < 1:
        return Outcome(claim, UNTESTABLE, finding, "; ".join(["there was nothing to measure", *notes]))
    above, below = finding.low > claim.threshold, finding.high < claim.threshold
    if above if claim.side == "above" else below:
        return Outcome(claim, REPRODUCED, finding, "; ".join(notes))
    if not above and not below:
        notes.insert(0, "the interval contains the threshold")
    return Outcome(claim, NOT_REPRODUCED, finding, "; ".join(notes))
