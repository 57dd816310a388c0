"""Heads whose vocabulary is spread over processes, as transformers' tensor parallelism does it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import logitlab as ll
from tests import zoo

WORKER = """
import os, sys
import torch.distributed as dist
from transformers import AutoModelForCausalLM
import logitlab as ll
from tests import zoo

dist.init_process_group("gloo")
module = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
local = module.lm_head.weight.to_local().shape[0]
reading = ll.read(ll.wrap(module), [zoo.ids(6), zoo.ids(4)], target=[5])
reading.save(f"{sys.argv[2]}/{dist.get_rank()}.parquet")
print(dist.get_rank(), local)
dist.destroy_process_group()
"""


def test_a_vocabulary_over_two_processes(checkpoint: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [*command, str(worker), str(checkpoint), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        timeout=240,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert sorted(out.stdout.split("\n")[:2]) == ["0 150", "1 150"]  # each holds half of the head
    whole = ll.read(ll.load(checkpoint), [zoo.ids(6), zoo.ids(4)], target=[5])
    for rank in (0, 1):
        reading = ll.Reading.load(tmp_path / f"{rank}.parquet")
        for key, values in whole.arrays.items():
            np.testing.assert_allclose(reading.arrays[key], values, atol=1e-5, err_msg=f"{rank} {key}")
