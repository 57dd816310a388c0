"""A tuned-lens folder with chosen maps, written by tuned-lens itself, and what it reads with it.

Run in tuned-lens' environment: python write_tuned_lens.py MODEL IDS.npy FOLDER READING.npy
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

del sys.path[0]  # its own folder has modules named like the peers


def main() -> None:
    """Make, save, load, read: log-probabilities [layers, tokens, V], nats."""
    from transformers import AutoModelForCausalLM
    from tuned_lens import TunedLens

    folder, ids_file, out, reading = sys.argv[1:5]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made: Any = TunedLens.from_model(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.layer_translators.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    made.save(out)
    lens: Any = TunedLens.from_model_and_pretrained(model, out)
    ids = torch.from_numpy(np.load(ids_file)).unsqueeze(0)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[:-1]
        found = [lens(h[0], i).log_softmax(-1) for i, h in enumerate(hidden)]
    np.save(reading, torch.stack(found).numpy())


if __name__ == "__main__":
    main()
