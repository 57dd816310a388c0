"""Peak memory of reading a long prompt, over the model's own forward pass.

Each case runs in a process of its own and reports the highest resident memory that it reached.
Run: python benchmarks/memory.py [--tokens 1024]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

CASES = {
    "forward": "the model's own forward pass, logits included",
    "read top-5": "read: all residual sites, top 5",
    "read all": "read: all residual sites, top 5, one target",
}


def run(case: str, tokens: int) -> None:
    """Run one case and print the process's peak memory in MB."""
    import torch

    import logitlab as ll

    model = ll.load("default")
    ids = torch.randint(100, 40_000, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    if case == "forward":
        with torch.no_grad():
            model.module(torch.tensor([ids]), use_cache=False)
    else:
        ll.read(model, ids, target=[7042] if case == "read all" else None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mb": peak}))


def main() -> None:
    """Measure every case and print what reading adds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--case", choices=CASES)
    options = parser.parse_args()
    if options.case:
        run(options.case, options.tokens)
        return
    peaks: dict[str, float] = {}
    for case, text in CASES.items():
        command = [sys.executable, __file__, "--case", case, "--tokens", str(options.tokens)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[case] = json.loads(out.splitlines()[-1])["peak_mb"]
        added = "" if case == "forward" else f"   {peaks[case] - peaks['forward']:+6.0f} MB over the forward pass"
        print(f"{options.tokens} tokens: {text:48} {peaks[case]:7.0f} MB{added}")
    whole = 31 * options.tokens * 49152 * 4 / 2**20
    print(f"a float32 table of [31 sites x {options.tokens} tokens x 49,152 columns] would be {whole:,.0f} MB")


if __name__ == "__main__":
    main()
