"""A sweep on a Ray cluster gives what it gives here, whatever becomes of a node."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import logitlab as ll
from logitlab.errors import InputError
from logitlab.sweeps import sweep
from tests import zoo
from tests.sweeps.test_sweep import content
from tests.words import rows as texts

ray: Any = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def model() -> ll.Model:
    return ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")


def test_an_address_that_does_not_answer(model: ll.Model, tmp_path: Path) -> None:
    for address, match in (
        ("127.0.0.1:9", r"no Ray cluster answers at 127\.0\.0\.1:9"),
        ("ray://127.0.0.1:9", "no Ray cluster answers at ray://"),
        ("nowhere", "is no address of a Ray cluster"),
    ):
        begin = time.monotonic()
        with pytest.raises(InputError, match=match):
            sweep(model, texts(), folder=tmp_path / address.replace("/", ""), ray=address, length=16)
        assert time.monotonic() - begin < 60
    with pytest.raises(InputError, match="name a folder"):
        sweep(model, texts(), ray="local")
    with pytest.raises(InputError, match="workers is 0"):
        sweep(model, texts(), ray="local", workers=0, folder=tmp_path / "w", length=16)


@pytest.mark.slow
def test_two_nodes_of_which_one_is_lost(model: ll.Model, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    options: dict[str, Any] = {"length": 16, "shard_windows": 1, "rows": True}
    sweep(model, texts(150), folder=tmp_path / "here", **options)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    try:
        seen: list[int] = []

        def loses(p: Any) -> None:
            seen.append(p.shards)
            if len(seen) == 5:
                cluster.remove_node(node, allow_graceful=False)

        sweep(model, texts(150), folder=tmp_path / "there", ray=cluster.address, workers=2, progress=loses, **options)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len(seen) > 5
    assert content(tmp_path / "there") == content(tmp_path / "here")
