"""A contestant's process: it loads a model once, then runs and measures the cases that it is told to.

Lines of JSON come in on standard input and go out on standard output. It runs in the contestant's own
environment, so nothing of logitlab is imported here.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_MEMORY = 14 * 2**30
"""Bytes of address space beyond what is used after loading. A case that wants more "does not fit".

The limit is on address space (RLIMIT_AS), not on resident memory, for which Linux has no such limit: a case that
reserves more than it touches can be stopped too. It is there because the contestants, eight processes, share one
machine, and one that took all of its memory would have others killed.
"""


def peak_of(case: Callable[[], object]) -> tuple[float, float]:
    """Seconds that a case takes, and MB that it holds at most beyond what was held before."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = status_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    start = time.perf_counter()
    case()
    seconds = time.perf_counter() - start
    return seconds, (status_of("VmHWM") - before) / 1024


def status_of(name: str) -> int:
    """A size in kB that the kernel tells of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def main() -> None:
    """Load, then answer until the input ends."""
    name, folder = sys.argv[1:3]
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print; the protocol has standard output to itself
    contestant: Any = importlib.import_module(f"contestants.{name}").Contestant(folder)
    soft = status_of("VmSize") * 1024 + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
    model = next((m for n in ("module", "hf_model") if (m := getattr(contestant.model, n, None))), contestant.model)
    dtypes = sorted({str(p.dtype) for p in model.parameters()})
    print(json.dumps({"ready": name, "threads": contestant.threads, "dtypes": dtypes}), file=out, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            case = contestant.case(order["what"], order["ids"])
            if case is None:
                answer: dict[str, Any] = {"offered": False}
            else:
                small = contestant.case(order["what"], order["ids"][:6])
                if small is not None and not hasattr(small, "way"):
                    small()  # pages that other processes have pushed out of memory are not counted
                seconds, memory = peak_of(case)
                answer = {"offered": True, "seconds": seconds, "memory": memory}
                if hasattr(case, "way"):
                    answer["way"] = str(case.way)
        except Exception as error:
            no_room = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))
            said = f"{type(error).__name__}: {error}"
            answer = {"offered": True, "does_not_fit": True} if no_room else {"error": said}
        case = None  # a floor's output goes before the next case is made
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
