"""Does screening keep its promise? Every row of a real 4,096-token text at all residual sites, against float64.

Exact and screened readings are held against the same hidden states decoded in float64, statistic by statistic. Ids are
said to be exact always, so one that differs is wrong unless float64 has a tie there (a gap of at most `SURE`). Every
statistic must lie within the bound that its row states.
This is 6 thousand million logits in float64, some minutes.
Run: python benchmarks/screening.py [--tokens 4096]
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

import logitlab as ll
from logitlab.logits import Head
from logitlab.logits.statistics import TIE
from logitlab.models.capture import capture
from machine import Result, real_text

TARGET, TOP = 7042, 10
POSITIONS = 64
"""Positions of a piece: [31 sites x 64] rows of logits in float64 are held."""

SURE, ROUNDING = 1e-9, 1e-4
"""Nats between logits that float64 cannot order with certainty; nats that a Reading in float32 may be off by itself."""

COMPARED = ("top_logprob", "entropy", "kl", "target_logprob")


def truth(x: torch.Tensor, final: torch.Tensor, head: torch.Tensor) -> dict[str, np.ndarray]:
    """Statistics of rows [sites, positions, d] in float64, every formula as it is written."""
    found: dict[str, list[torch.Tensor]] = {}
    log_r = (final.double() @ head.T).log_softmax(-1)
    r = log_r.exp()
    for rows in x:
        z = rows.double() @ head.T
        lse = z.logsumexp(-1, keepdim=True)
        log_p = z - lse
        best = z.topk(TOP + 1, dim=-1)
        values = {
            "top_id": best.indices[:, :TOP],
            "top_logprob": (best.values - lse)[:, :TOP],
            "gap": best.values[:, :-1] - best.values[:, 1:],
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "kl": (r * (log_r - log_p)).sum(-1),
            "target_logprob": log_p[:, TARGET, None],
            "target_rank": _rank(z),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(value).numpy() for name, value in found.items()}


def _rank(z: torch.Tensor) -> torch.Tensor:
    """Rank [n, 1] of the target, ties as `logitlab.logits.statistics` defines them."""
    steps = (z / TIE).round_()
    own = steps[:, TARGET, None].clone()
    lower = torch.arange(z.shape[1]) < TARGET
    return 1 + ((steps > own) | ((steps == own) & lower)).sum(-1, keepdim=True)


def measure(tokens: int) -> Result:
    """Largest differences, the stated bounds, and how many rows were done in full."""
    model = ll.load("default")
    source = model.tail.source
    assert isinstance(source, Head)
    head = source.weight.detach().double()
    ids = model.tokenizer(real_text()[: 8 * tokens])["input_ids"][:tokens]
    options = {"target": TARGET, "top_k": TOP}
    readings = {p: ll.read(model, ids, precision=p, **options) for p in ("exact", "screened")}
    states = capture(model, ids)
    worst: Result = {p: {} for p in readings}
    wrong = dict.fromkeys(readings, 0)
    apart = dict.fromkeys(readings, 0)
    ranks = dict.fromkeys(readings, 0)
    beyond = 0
    for start in range(0, tokens, POSITIONS):
        part = slice(start, min(start + POSITIONS, tokens))
        x = torch.stack([model.tail.prepare(states.kept[s.layer, s.kind][part]) for s in states.sites])
        exact = truth(x, x[-1], head)
        for p, reading in readings.items():
            arrays = {name: values[0][:, part] for name, values in reading.arrays.items()}
            bound = arrays.get("bound", np.zeros(arrays["kl"].shape))[..., None]
            for name in COMPARED:
                gap = np.abs(arrays[name] - exact[name])
                worst[p][name] = max(worst[p].get(name, 0.0), float(gap.max()))
                if p == "screened":
                    allowed = bound if gap.ndim == bound.ndim else bound[..., 0]
                    beyond += int((gap > allowed + ROUNDING).sum())
            differ = arrays["top_id"] != exact["top_id"]
            near = np.minimum(exact["gap"], np.roll(exact["gap"], 1, axis=-1))
            near[..., 0] = exact["gap"][..., 0]
            wrong[p] += int((differ & (near > SURE)).sum())
            apart[p] += int((differ & (near > np.maximum(bound, SURE))).sum())
            ranks[p] += int((arrays["target_rank"] != exact["target_rank"]).sum())
        print(f"{part.stop} of {tokens} positions", file=sys.stderr)
    bound = readings["screened"].arrays["bound"]
    return {
        "tokens": tokens,
        "rows": int(bound.size),
        "worst": worst,
        "wrong_top": wrong,
        "wrong_top_beyond_bound": apart,
        "wrong_rank": ranks,
        "beyond_bound": beyond,
        "largest_bound": float(bound.max()),
        "in_full": float((bound == 0).mean()),
    }


def markdown(found: Result) -> str:
    """One table."""
    lines = [
        f"{found['rows']:,} rows: 31 sites × {found['tokens']:,} tokens.",
        "",
        "| largest difference from float64 | exact | screened |",
        "|---|---|---|",
    ]
    names = {
        "top_logprob": "log-probability of the top 10, nats",
        "entropy": "entropy, nats",
        "kl": "KL, nats",
        "target_logprob": "log-probability of a target, nats",
    }
    worst = found["worst"]
    lines += [f"| {text} | {worst['exact'][n]:.1e} | {worst['screened'][n]:.1e} |" for n, text in names.items()]
    wrong, apart, ranks = found["wrong_top"], found["wrong_top_beyond_bound"], found["wrong_rank"]
    lines += [
        f"| top-10 ids that differ, but for ties (gaps up to {SURE:g}) | {wrong['exact']} | {wrong['screened']} |",
        f"| of them where the gap exceeds the row's bound | {apart['exact']} | {apart['screened']} |",
        f"| ranks that differ | {ranks['exact']} | {ranks['screened']} |",
        "",
        f"The largest bound that the screened reading states is {found['largest_bound']:.1e} nats; "
        f"{found['beyond_bound']} of all log-probabilities, entropies and divergences are further off than the bound "
        f"of their row (and {ROUNDING:g}, since a Reading keeps float32 and KL goes up to a hundred nats); "
        f"{found['in_full']:.1%} of the rows were done in full.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    print(markdown(measure(parser.parse_args().tokens)))


if __name__ == "__main__":
    main()
