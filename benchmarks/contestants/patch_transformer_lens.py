"""TransformerLens' activation patching of all layers and positions of one pair.

Run in TransformerLens' environment: python patch_transformer_lens.py MODEL PAIR.json OUT.npy
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

del sys.path[0]  # its own folder has modules named like the peers
sys.path.append(str(Path(__file__).parents[1]))


def main() -> None:
    """Patch, save the metric of every place [layers, positions], print seconds and peak memory."""
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    from contestants.worker import peak_of

    folder, pair, out = sys.argv[1:4]
    stdout, sys.stdout = sys.stdout, sys.stderr
    model: Any = TransformerBridge.boot_transformers(folder, device="cpu")
    model.eval()
    given = json.loads(Path(pair).read_text())
    clean, corrupted = (torch.tensor([given[name]]) for name in ("clean", "corrupted"))
    right, wrong = given["answers"]
    found: list[Any] = []

    def work() -> None:
        with torch.no_grad():
            _, cache = model.run_with_cache(
                clean, names_filter=lambda name: name.endswith(("hook_resid_pre", "hook_in"))
            )
            found.append(
                patching.get_act_patch_resid_pre(
                    model, corrupted, cache, lambda logits: logits[0, -1, right] - logits[0, -1, wrong]
                )
            )

    seconds, megabytes = peak_of(work)
    np.save(out, found[0].float().numpy())
    print(json.dumps({"seconds": seconds, "megabytes": megabytes}), file=stdout)


if __name__ == "__main__":
    main()
