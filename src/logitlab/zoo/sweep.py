"""Verify every type of the zoo in worker processes; the results go to a file, line by line.

A worker is a process that lives for many types, because importing transformers takes longer than
most types do. Jobs and results go over its pipes as lines of JSON. One that hangs or dies takes only
the type that it had in hand with it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from time import monotonic, perf_counter
from typing import Any

from logitlab import __version__
from logitlab.errors import InputError, ModelError
from logitlab.files import check_writable
from logitlab.zoo.coverage import Coverage, Header, Key, Layers, Result, load, save, without

ZOO = "logitlab.zoo"
"""Module with ``TASKS``, ``types``, ``build`` and ``CannotBuild``."""

BASELINE = Path("docs/coverage.jsonl")
"""The results that are kept in the repository."""

EXACT = 1e-5
"""Largest difference with which a type counts as verified."""

TIMEOUT = 120.0
"""Seconds that a type may take."""

_STARTING = 600.0  # seconds until a worker has to be ready: importing from a cold disk is slow

SLICE: Mapping[str, Sequence[str]] = {
    "causal-lm": ("gemma3_text", "gpt2", "llama", "mamba", "opt", "qwen3_moe", "recurrent_gemma", "xlnet"),
    "masked-lm": ("albert", "bert", "deberta-v2", "modernbert"),
    "seq2seq-lm": ("bart", "nllb-moe", "t5"),
    "sequence-classification": ("bart", "bert", "gpt2"),
    "token-classification": ("llama", "roberta"),
    "image-classification": ("convnext", "swin", "vit"),
    "image-text-to-text": ("idefics3", "llava", "paligemma", "qwen2_vl"),
    "zero-shot-image-classification": ("clip", "siglip"),
    "object-detection": ("detr", "rt_detr", "yolos"),
    "speech-to-text": ("speech_to_text", "whisper"),
    "ctc": ("wav2vec2", "wav2vec2-bert"),
    "audio-classification": ("audio-spectrogram-transformer", "wav2vec2"),
}
"""A few types of each task, as different as possible, that can be tried in a minute or two."""

Report = Callable[[Result | None, int, int], None]
"""Called with a result (None at the start), how many types are done, and how many there are."""


@dataclass(frozen=True)
class Choice:
    """Which types to try.

    Attributes:
        tasks: names of tasks; empty for all.
        pattern: regular expression that fits the whole of ``type`` or ``task/type``; None for all.
        only_slice: leave out what is not in `SLICE`.
    """

    tasks: tuple[str, ...] = ()
    pattern: str | None = None
    only_slice: bool = False

    def takes(self, task: str, model_type: str) -> bool:
        """Whether a type is chosen."""
        if self.tasks and task not in self.tasks:
            return False
        if self.only_slice and model_type not in SLICE.get(task, ()):
            return False
        names = (model_type, f"{task}/{model_type}")
        return self.pattern is None or any(re.fullmatch(self.pattern, name) for name in names)

    def check(self, listing: Mapping[str, Sequence[str]]) -> None:
        """Raise `InputError` if a task does not exist or nothing is chosen."""
        unknown = next((t for t in self.tasks if t not in listing), None)
        if unknown is not None:
            raise InputError(f"there is no task {unknown!r}; there are {', '.join(listing)}")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise InputError(
                f"types {self.pattern!r} are no regular expression ({error}); try 'llama|gemma.*'"
            ) from error
        if not any(self.takes(task, name) for task, names in listing.items() for name in names):
            what = "the slice" if self.pattern is None else f"types {self.pattern!r}"
            raise InputError(
                f"{what} has no type of {', '.join(self.tasks) or 'any task'}: an expression has to fit a whole type, "
                "as 'gemma.*' does, or a whole task/type"
            )


def sweep(
    out: str | Path,
    choice: Choice | None = None,
    *,
    workers: int | None = None,
    timeout: float = TIMEOUT,
    restart: bool = False,
    seed: int = 0,
    zoo: str | None = None,
    report: Report | None = None,
) -> Coverage:
    """Try every chosen type that the file does not have yet.

    Args:
        out: file of results (JSON lines). It grows with each type, so after a kill the same call goes on
            where it was; at the end it is put into a fixed order.
        choice: which types; by default all.
        workers: number of processes; by default one a processor.
        timeout: seconds that a type may take.
        restart: forget earlier results of the chosen types, and all results if the versions differ.
        seed: of the random weights.
        zoo: module that builds the models; by default `ZOO`.
        report: is told of each result.

    Returns:
        All results in the file.

    Raises:
        InputError: the choice is empty; the file cannot be written, holds something else, or has results
            of other versions; or the workers do not start.
    """
    out, choice, zoo = Path(out), choice or Choice(), zoo or ZOO
    check_writable(out)
    listing = _listing(zoo)
    choice.check(listing)
    chosen = [(task, name) for task, names in listing.items() for name in names if choice.takes(task, name)]
    header = Header(versions(), seed, datetime.now(UTC).date().isoformat(), {t: len(n) for t, n in listing.items()})
    with _writing(out):
        held = _held(out, header, chosen, restart)
        file = out.open("ab")
    results = held.results
    jobs = [key for key in chosen if key not in results]
    total = len(chosen)
    if report is not None:
        report(None, total - len(jobs), total)
    with file, closing(_try(jobs, workers or os.cpu_count() or 1, timeout, seed, zoo)) as tried:
        for done, result in enumerate(tried, total - len(jobs) + 1):
            with _writing(out):
                file.write(f"{result.line()}\n".encode())
                file.flush()
            results[result.key] = result
            if report is not None:
                report(result, done, total)
    there = {(task, name) for task, names in listing.items() for name in names}
    kept = {key: result for key, result in results.items() if key in there}
    whole = Coverage(header if jobs else replace(header, date=held.header.date), kept)
    save(whole, out)
    return whole


def versions() -> dict[str, str]:
    """Versions of the libraries that decide about the results, without the local part (``+cpu``)."""
    installed = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {name: version.partition("+")[0] for name, version in ({"logitlab": __version__} | installed).items()}


def _listing(zoo: str) -> dict[str, list[str]]:
    """The types of every task; the tasks in the zoo's order, the types in that of their names."""
    module: Any = import_module(zoo)
    return {str(task): sorted(set(module.types(task))) for task in module.TASKS}


def _held(out: Path, header: Header, chosen: Sequence[Key], restart: bool) -> Coverage:
    """What a file already has and is still good, with the file brought to that state."""
    held = load(out) if out.exists() and not (restart and _alien(out)) else None
    if held is None:
        held = Coverage(header)
        save(held, out)
        return held
    different = held.header.differences(header)
    if different and not restart:
        raise InputError(
            f"{out} has results of {', '.join(different)}: give --restart to replace them, or another --out"
        )
    if restart:
        held = Coverage(header) if different else without(held, chosen)
        save(held, out)
    else:
        os.truncate(out, held.size)
    return held


@contextmanager
def _writing(out: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {out}: {error.strerror or error}; mend that, the same command then continues"
        ) from error


def _alien(path: Path) -> bool:
    try:
        load(path)
    except InputError:
        return True
    return False


# -- the pool ----------------------------------------------------------------------------------


_PATIENCE = 10.0  # seconds that a process may take to end after its output has ended
_WORK = "from logitlab.zoo.sweep import work; work()"


class _Worker:
    """One process, and what it has in hand."""

    def __init__(self, events: Queue[tuple[_Worker, bytes | None]], zoo: str, seed: int) -> None:
        self.events = events
        self.job: Key | None = None
        self.ready = False
        self.fresh = True
        self.started = monotonic()
        self.deadline = self.started + _STARTING
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.log_from = 0
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
            [sys.executable, "-P", "-c", _WORK, zoo, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=os.environ | _ENVIRONMENT,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the whole group
        )
        Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as answers:
            for line in answers:
                self.events.put((self, line))
        self.events.put((self, None))

    def give(self, job: Key, timeout: float) -> None:
        """Hand over a job. If the process is gone, the end of its output will say so."""
        assert self.process.stdin is not None
        self.job = job
        self.started = monotonic()
        self.deadline = self.started + timeout
        self.log_from = self.log.seek(0, os.SEEK_END)
        with suppress(OSError):
            self.process.stdin.write(f"{json.dumps(job)}\n".encode())
            self.process.stdin.flush()

    def failure(self, status: str, reason: str) -> Result:
        """The result of the job in hand, of which the worker will not tell."""
        assert self.job is not None
        return Result(*self.job, status, reason=reason, seconds=round(monotonic() - self.started, 3))

    def last_words(self) -> str:
        """How the process ended, and the last line it wrote about the job in hand."""
        try:
            code = self.process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:  # it has closed its output and lives on
            self.process.kill()
            self.process.wait()
            return "closed its output"
        if code < 0:
            how = f"killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += ", as when memory runs out"
        else:
            how = f"exit status {code}"
        self.log.seek(self.log_from)
        lines = [line for line in self.log.read()[-4000:].decode(errors="replace").splitlines() if line.strip()]
        return _one_line(f"{how}: {lines[-1]}" if lines else how)

    def end(self) -> None:
        """Kill it, with all that it has started."""
        with suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.log):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()


_ENVIRONMENT = {
    # Workers share the processors, and nothing may be fetched: random weights need nothing. Differences depend on
    # the number of threads (how sums are split), so one thread also makes them the same on every machine of a kind.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}


def _try(jobs: Sequence[Key], workers: int, timeout: float, seed: int, zoo: str) -> Generator[Result]:
    """Give jobs to workers and yield results as they come; closing the generator ends the workers."""
    events: Queue[tuple[_Worker, bytes | None]] = Queue()
    waiting = deque(jobs)
    crashed: set[Key] = set()
    pool: set[_Worker] = set()

    def replace_worker(worker: _Worker) -> None:
        pool.discard(worker)
        worker.end()
        if waiting:
            pool.add(_Worker(events, zoo, seed))

    try:
        for _ in range(min(workers, len(jobs))):
            pool.add(_Worker(events, zoo, seed))
        while pool:
            nearest = min(worker.deadline for worker in pool)
            try:
                worker, line = events.get(timeout=max(0.0, nearest - monotonic()))
            except Empty:
                for worker in [w for w in pool if w.deadline <= monotonic()]:
                    if not worker.ready:
                        raise InputError(
                            f"a worker of the sweep was not ready after {_STARTING:g} s; use fewer --workers"
                        ) from None
                    yield worker.failure("timed out", f"no result within {timeout:g} s")
                    replace_worker(worker)
                continue
            if worker not in pool:
                continue  # was killed while this was on its way
            if line is None:
                words = worker.last_words()
                if not worker.ready:
                    raise InputError(f"a worker of the sweep did not start: {words}")
                assert worker.job is not None
                if worker.fresh or worker.job in crashed:
                    yield worker.failure("crashed", words)
                else:
                    # May be the fault of an earlier type (memory, say): once more, in a process of its own age.
                    crashed.add(worker.job)
                    waiting.appendleft(worker.job)
                replace_worker(worker)
                continue
            if worker.job is not None:
                worker.fresh = False
                yield Result.of(json.loads(line))
            worker.ready = True
            if waiting:
                worker.give(waiting.popleft(), timeout)
            else:
                pool.discard(worker)
                worker.end()
    finally:
        for worker in pool:
            worker.end()


# -- in a worker -------------------------------------------------------------------------------


def work() -> None:
    """The life of a worker: lines of ``[task, type]`` on standard input, results on standard output."""
    zoo_name, seed = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what models print must not get between the answers
    jobs: Queue[Key] = Queue()
    Thread(target=_take, args=(jobs,), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    import_module("logitlab.models.handle")  # before the first type's time runs
    zoo: Any = import_module(zoo_name)
    print("{}", file=answers, flush=True)
    while True:
        task, model_type = jobs.get()
        print(examine(zoo, task, model_type, seed).line(), file=answers, flush=True)
        gc.collect()


def _take(jobs: Queue[Key]) -> None:
    """Read jobs; when the parent is gone or has no more, end the process, whatever it is doing."""
    for line in sys.stdin:
        task, model_type = json.loads(line)
        jobs.put((task, model_type))
    os._exit(0)


def examine(zoo: Any, task: str, model_type: str, seed: int = 0) -> Result:
    """Build one type and wrap it."""
    import logitlab

    started = perf_counter()
    result = Result(task, model_type, "refused")
    module: Any = None
    try:
        module = zoo.build(task, model_type, seed=seed)
        result = replace(result, architecture=type(module).__name__)
        result = _read_off(result, logitlab.wrap(module))
    except zoo.CannotBuild as error:
        result = replace(result, status="not built", reason=_one_line(str(error)))
    except ModelError as error:
        failure = _failure(module)
        if failure is not None:
            result = replace(result, status="not built", reason=f"does not run on its example inputs: {failure}")
        else:
            result = replace(result, reason=_one_line(str(error)))
    except Exception as error:  # whatever comes is what the sweep is to show
        result = replace(result, reason=_one_line(f"unexpected {type(error).__name__}: {error}"))
    return replace(result, seconds=round(perf_counter() - started, 3))


def _failure(module: Any) -> str | None:
    """What a model says when it is run on its example inputs without logitlab, or None if it runs.

    Where logitlab cannot make up inputs at all, that is logitlab's refusal and not the model's.
    """
    if module is None:
        return None
    import torch

    from logitlab.models.example import example_inputs

    try:
        inputs = example_inputs(module)
    except ModelError:
        return None
    try:
        with torch.no_grad():
            module(**inputs)
    except Exception as error:  # a model's code can raise anything
        return _one_line(f"{type(error).__name__}: {error}")
    return None


def _read_off(result: Result, model: Any) -> Result:
    """What a verified model says about itself."""
    record = model.verification
    fast = bool(record.fast_form.holds)
    # A check without a number counts as 0 in the record's own maximum; here it must not pass for a proof.
    measured = record.tail.error is not None and (record.fast_form.error is not None or not fast)
    difference = float(record.max_abs_difference) if measured else math.nan
    exact = difference <= EXACT
    # Exact, but not row by row: a reader of the page should know.
    how = record.tail.note if record.tail.note.startswith("whole states") else ""
    found = f"differs by {difference:.1e}, more than {EXACT:.0e}" if measured else "no difference was measured"
    return replace(
        result,
        status="verified" if exact else "inexact",
        difference=difference if math.isfinite(difference) else None,
        space=getattr(getattr(model, "space", None), "name", None),
        stack=_layers(model.stack),
        stacks=tuple(_layers(stack) for stack in model.stacks),
        fast_form=fast,
        sites=tuple(record.offered),
        reason=how if exact else found,
    )


def _layers(stack: Any) -> Layers:
    return Layers(str(stack.name), len(stack), int(stack.width))


def _one_line(text: str) -> str:
    """An error's text as one short line that is the same on every machine: no folders, no addresses."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = re.sub(r"(?<![\w.:/])(?:/[\w.+~@-]+)+/([\w.+~@-]+)", r"\1", text)
    text = re.sub(r"\b0x[0-9a-f]{6,}\b", "0x…", text)
    return text if len(text) <= 400 else f"{text[:399]}…"
