"""tuned-lens' own training loop (`tuned_lens.scripts.train_loop.Train.execute`) on given windows of tokens.

Its command does not start with the torchdata of today, whose loader it imports, so that import is answered with a
stand-in and the set-up is done here; the loop itself, optimiser and schedule included, is run as it is.
Run in tuned-lens' environment: python fit_tuned_lens.py MODEL IDS.npy STEPS WINDOWS_PER_STEP OUT
"""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

del sys.path[0]  # its own folder has modules named like the peers
sys.path.append(str(Path(__file__).parents[1]))


def _stand_ins() -> None:
    class Anything(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return type(name, (), {})

    for name in ("torchdata.dataloader2", "torchdata.datapipes", "torchdata.datapipes.iter"):
        sys.modules.setdefault(name, Anything(name))


class Place:
    """The one processor, in the place of tuned-lens' `Distributed`."""

    device = torch.device("cpu")
    primary = True

    def barrier(self) -> None:
        """Nobody to wait for."""

    def send_to_device(self, batch: Any) -> Any:
        """It is there."""
        return batch


def main() -> None:
    """Fit, save the lens, print seconds and peak memory."""
    from transformers import AutoModelForCausalLM
    from tuned_lens import TunedLens

    _stand_ins()  # not before: Transformers looks at what is installed
    from tuned_lens.scripts.ingredients import Optimizer
    from tuned_lens.scripts.train_loop import LossChoice, State, Train

    from contestants.worker import peak_of

    folder, ids_file, steps, windows, out = sys.argv[1:6]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.load(ids_file)).long()
    lens = TunedLens.from_model(model)
    options = Optimizer()
    optimiser = options.create_optim(list(lens.parameters()))
    state: Any = State(
        dataloader=[{"input_ids": ids[i : i + 1]} for i in range(len(ids))],  # type: ignore[arg-type]
        lens=lens,
        opt=optimiser,
        scheduler=options.create_scheduler(optimiser, int(steps)),
        wandb_id=None,
        nats_to_bpb=1.0,
    )
    train = object.__new__(Train)
    train.dist, train.wandb, train.checkpoint_freq = Place(), None, None  # type: ignore[assignment]
    train.num_steps, train.loss, train.token_shift, train.output = int(steps), LossChoice.KL, None, Path(out)
    train.opt = options
    train.setup = lambda: (state, model, int(windows))  # type: ignore[method-assign, assignment]
    stdout, sys.stdout = sys.stdout, sys.stderr
    begin = time.perf_counter()
    seconds, megabytes = peak_of(train.execute)
    print(json.dumps({"seconds": seconds, "megabytes": megabytes, "all": time.perf_counter() - begin}), file=stdout)


if __name__ == "__main__":
    main()
