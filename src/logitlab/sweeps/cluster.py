"""The same sweep on a Ray cluster: every worker has the model, takes shards, and writes what they give."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from logitlab.errors import InputError
from logitlab.lenses.base import Lens
from logitlab.models.handle import Model, wrap
from logitlab.sweeps.job import Job, Shard, Worker, keep

PATIENCE = 30.0
"""Seconds that a cluster has to answer."""


class Cluster:
    """A connection to a Ray cluster, with the model and the lenses put where its workers find them.

    Args:
        address: of the cluster; ``local`` starts one on this machine for as long as it is needed.
        model: the model; workers get a copy of the module.
        lenses: lenses by name.
        job: the job.
        folder: where workers write.
        workers: how many; by default one a node.

    Raises:
        InputError: Ray is not installed, or no cluster answers there.
    """

    def __init__(
        self, address: str, model: Model, lenses: Mapping[str, Lens], job: Job, folder: Path, workers: int | None
    ) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"workers is {workers}; it must be at least 1")
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise InputError("a sweep on a cluster needs Ray: install logitlab[scale]") from error
        self._ray: Any = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            _check_answers(address)
            try:
                ray.init(
                    address=None if address == "local" else address,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise InputError(
                    f"no Ray cluster answers at {address}: {' '.join(str(error).split())[:200]}"
                ) from error
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        self._job, self._folder = job, folder.resolve()
        self._workers = workers or max(1, sum(1 for node in ray.nodes() if node["Alive"]))
        self._load = ray.put((model.module, model.processor or model.tokenizer, model.name, model.stack.name))
        self._lenses = ray.put(dict(lenses))
        self._fingerprint = model.fingerprint
        self._gpus = 1 if model.device.type == "cuda" else 0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._mine:
            self._ray.shutdown()

    def do(self, shards: Sequence[Shard]) -> Iterator[int]:
        """Have shards done, in whatever order; their numbers as they are ready."""
        if not shards:
            return
        arguments = (self._load, self._lenses, self._job, str(self._folder), self._fingerprint)
        data = self._ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        done = data.map_batches(
            _Doer,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=self._ray.data.ActorPoolStrategy(size=min(self._workers, len(shards))),
            num_cpus=1,
            num_gpus=self._gpus,
        )
        try:
            for row in done.iter_rows():
                yield int(row["index"])
        except self._ray.exceptions.RayError as error:
            raise InputError(f"the cluster gave up: {_cause(error)}") from error


class _Doer:
    """What runs in a worker: one model, shard after shard."""

    def __init__(self, load: Any, lenses: Any, job: Job, folder: str, fingerprint: str) -> None:
        import ray

        module, tokenizer, name, stack = ray.get(load)
        model = wrap(module, tokenizer, name=name, stack=stack)
        if model.fingerprint != fingerprint:
            raise InputError(f"{name} is not the same model in this worker")
        self._worker = Worker(model, ray.get(lenses), job)
        self._folder = Path(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done: list[int] = []
        for shard in batch["shard"]:
            self._folder.mkdir(parents=True, exist_ok=True)
            keep(self._folder, self._worker, shard)
            done.append(shard.index)
        return {"index": done}


def _check_answers(address: str) -> None:
    """Refuse an address at once where nobody listens: Ray itself tries for a long time."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not host or not port.isdigit():
        raise InputError(f"{address!r} is no address of a Ray cluster: give auto, local, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise InputError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error


def _cause(error: BaseException) -> str:
    """The last line of what Ray says, which has the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
