"""A Jacobian lens with chosen matrices, written by TransformerLens itself, and what it reads with it.

Run in TransformerLens' environment: python write_jacobian_lens.py MODEL IDS.npy FILE.pt READING.npy
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

del sys.path[0]  # its own folder has modules named like the peers


def main() -> None:
    """Make, save, load, read: log-probabilities [layers, tokens, V], nats."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    folder, ids_file, out, reading = sys.argv[1:5]
    model: Any = TransformerBridge.boot_transformers(folder, device="cpu")
    model.eval()
    width, layers = model.cfg.d_model, model.cfg.n_layers
    generator = torch.Generator().manual_seed(0)
    matrices = {i: torch.eye(width) + 0.05 * torch.randn(width, width, generator=generator) for i in range(layers - 1)}
    JacobianLens(jacobians=matrices, n_prompts=3, d_model=width).save(out)
    lens: Any = JacobianLens.load(out)
    ids = torch.from_numpy(np.load(ids_file)).unsqueeze(0)
    found = lens.readout(model, ids, return_full_logits=True)
    np.save(reading, torch.stack([found.lens_logits[i].log_softmax(-1) for i in lens.source_layers]).numpy())


if __name__ == "__main__":
    main()
