"""TransformerLens' fit of a Jacobian lens on given prompts.

Run in TransformerLens' environment: python fit_transformer_lens.py MODEL PROMPTS.json OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

del sys.path[0]  # its own folder has modules named like the peers
sys.path.append(str(Path(__file__).parents[1]))


def main() -> None:
    """Fit, save in float32, print seconds and peak memory."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    from contestants.worker import peak_of

    folder, prompts, out = sys.argv[1:4]
    stdout, sys.stdout = sys.stdout, sys.stderr
    model: Any = TransformerBridge.boot_transformers(folder, device="cpu")
    model.eval()
    model.cfg.default_prepend_bos = False  # the same tokens as the other's
    texts = json.loads(Path(prompts).read_text())
    found: list[Any] = []

    def work() -> None:
        found.append(JacobianLens.fit(model, texts, corpus="given", dim_batch=16, show_progress=False))

    seconds, megabytes = peak_of(work)
    found[0].save(out, dtype=torch.float32)
    dtypes = sorted({str(p.dtype) for p in model.parameters()})
    print(json.dumps({"seconds": seconds, "megabytes": megabytes, "dtypes": dtypes}), file=stdout)


if __name__ == "__main__":
    main()
