"""A process that measures one thing on request, and idles otherwise.

    python -m benchmarks.worker '{"kind": ..., "images": ..., "options": {...}, "profiled": false,
        "beside": null}'

It answers each line of its input, a block {"lead": steps, "steps": n}, by one line of JSON: what
the ``n`` steps took, without those that lead to them, and as many steps of what is measured beside
them; profiled, also the seconds in each of torch's operations. Of several processes the first one
listens.
"""

import contextlib
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets  # noqa: F401  # what reads images imports it late; it belongs to the imports here
import torch
import torch.distributed as dist

from benchmarks import eager, rivals, workloads
from benchmarks.measuring import device, timed
from benchmarks.workloads import Steps
from dml_accel.training.progress import peak_memory

KINDS: dict[str, Callable[..., Steps]] = {
    "training": workloads.training,
    "networks": workloads.networks_alone,
    "losses": workloads.losses_alone,
    "products": workloads.matrix_products,
    "pytorch-dml": rivals.pytorch_dml,
    "plain": rivals.plain_loop,
    "accelerate": rivals.accelerated_loop,
    "timm": rivals.timm_step,
    "changed": eager.changed,
}
_WARM_UP = 3


def resident() -> int:
    """Return the bytes that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def blocks(first: bool) -> Iterator[list[int]]:
    """Yield what the first process reads, [lead, steps], in every process, until its input ends."""
    while True:
        word = torch.zeros(2, dtype=torch.int64, device=device())
        if first and (line := sys.stdin.readline()):
            asked = json.loads(line)
            word = torch.tensor([asked["lead"], asked["steps"]], device=device())
        if dist.is_initialized():
            dist.broadcast(word, 0)
        if word[1] == 0:
            return
        yield word.tolist()


def return_memory() -> None:
    """Give the system what is free, for many to idle; the steps that lead to a block take it."""
    with contextlib.suppress(AttributeError):  # the C library is another one
        ctypes.CDLL(None).malloc_trim(0)


def operations(work: Callable[[], None]) -> dict[str, float]:
    """Do some work; return the seconds in each of torch's operations without those it calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    return {
        event.key: event.self_cpu_time_total / 1e6
        for event in profiler.key_averages()
        if event.self_cpu_time_total > 0
    }


def answering() -> TextIO:
    """Return the output; whatever else prints goes to the log."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def main() -> None:
    """Prepare, warm up, then measure block by block."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    first = os.environ.get("RANK", "0") == "0"
    answers = answering()
    imported = resident() if device().type == "cpu" else 0  # a GPU holds no libraries
    started = time.perf_counter()
    if asked["profiled"]:
        torch._inductor.config.cpp.enable_kernel_profile = True  # compiled kernels have names, too
    steps = KINDS[asked["kind"]](asked["images"], **asked["options"])
    prepared_s = time.perf_counter() - started
    found = {"prepared_s": prepared_s, "warm_up_s": timed(lambda: steps(_WARM_UP))}
    beside = None
    if asked["beside"]:
        beside = KINDS[asked["beside"]["kind"]](asked["images"], **asked["beside"]["options"])
        beside(_WARM_UP)
    return_memory()
    if first:
        print(json.dumps(found), file=answers)
    for lead, count in blocks(first):
        steps(lead)
        answer: dict[str, Any] = {"seconds": timed(lambda count=count: steps(count))}
        if beside:
            beside(lead)
            answer["beside_seconds"] = timed(lambda count=count: beside(count))
        if asked["profiled"]:  # in steps of their own, as it takes time itself
            answer["operations"] = operations(lambda count=count: steps(count))
        return_memory()
        if first:
            answer["memory_bytes"] = peak_memory(device()) - imported
            print(json.dumps(answer), file=answers)
    os._exit(0)  # nothing is left to keep, and threads of the exchange would not end in order


if __name__ == "__main__":
    main()
