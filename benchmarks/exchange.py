"""What the exchange between peers costs: bytes that a process receives, and its share of a step.

    sudo python -m benchmarks.exchange [NAME ...] [--before CHECKOUT]

Processes train a cohort on hosts of their own: network namespaces that a bridge joins
(benchmarks/hosts.py), so that links count bytes and have the rate that is asked for. NAME is a
measurement of --list, or a pattern (bytes-*); the default is all. --before names a checkout of an
older dml_accel, which the measurements that end in -before use. Needs root and iproute2. Results
are added to benchmarks/exchange.json, from which benchmarks/exchange.md is written.
"""

import argparse
import dataclasses
import fnmatch
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from tabulate import tabulate

from benchmarks.hosts import check, hosts, launches
from benchmarks.measuring import HERE, ratio, surroundings
from dml_accel.analysis.statistics import summarise
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.distributed.costs import Cost
from dml_accel.distributed.plan import Machine, StepLoad, predict

_WORKER = HERE / "exchange_worker.py"
_HEADERS = 14 + 20 + 32  # bytes of Ethernet, IP and TCP with time stamps in a packet
_RATES = {"unlimited": None, "1gbit": "1gbit", "100mbit": "100mbit"}


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        kind: ``bytes`` or ``time``.
        cohort: of the run.
        ranks: the processes of each peer, in name order.
        batch: images of a step.
        image_size: of the images, which are noise.
        classes: of the images.
        flags: fields of the configuration besides.
        steps: that are measured; of bytes, in each block.
        blocks: of steps with KL, and as many without.
        hosts: of all processes, each with as many.
        rate: of a link; None: unlimited.
        mtu: the longest packet, in bytes.
    """

    kind: str
    cohort: str
    ranks: list[list[int]]
    batch: int
    hosts: int
    image_size: int = 8
    classes: int = 100
    flags: dict[str, Any] = field(default_factory=dict)
    steps: int = 6
    blocks: int = 2
    rate: str | None = None
    mtu: int = 9000

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return len({rank for held in self.ranks for rank in held})

    def predicted(self) -> list[float]:
        """Return the payload bytes that ``plan`` predicts for the exchange, process by process."""
        config = Config(
            cohort=(self.cohort,), batch_size=self.batch, placement="split", **self.flags
        )
        names = [str(place) for place in range(len(self.ranks))]
        ranks = dict(zip(names, self.ranks, strict=True))
        costs = dict.fromkeys(names, Cost(0, 0, 0, 0, 0))
        return predict(ranks, costs, StepLoad.of(config, self.classes), Machine()).exchanged


def teams(*widths: int) -> list[list[int]]:
    """Return consecutive processes for peers with so many each."""
    ends = [sum(widths[:place]) for place in range(len(widths) + 1)]
    return [list(range(lo, hi)) for lo, hi in itertools.pairwise(ends)]


def _counting(*widths: int, rows: int = 16, **fields: Any) -> Job:
    size = sum(widths)
    ranks, batch = teams(*widths), rows * size // len(widths)
    return Job("bytes", f"resnet8*{len(widths)}", ranks, batch, size, **fields)


def _timing(peers: int, rate: str | None) -> Job:
    ranks = teams(*[4 // peers] * peers)
    cohort = f"resnet20*{peers}"
    return Job("time", cohort, ranks, 32, 2, image_size=32, steps=30, rate=rate, mtu=1500)


MEASUREMENTS: dict[str, Job] = {
    **{
        f"bytes-{4 * each}-{code}": _counting(*[each] * 4)
        for each in (1, 2, 4)
        for code in ("before", "after")
    },
    **{f"bytes-{4 * each}-1000-classes": _counting(*[each] * 4, classes=1000) for each in (1, 4)},
    "bytes-5-and-3": _counting(5, 3, rows=15),
    "bytes-6-and-2": _counting(6, 2, rows=12),
    "bytes-sum": _counting(2, 2, 2, 2, flags={"exchange": "sum"}),
    "bytes-bf16": _counting(2, 2, 2, 2, flags={"exchange_dtype": "bf16"}),
    **{
        f"time-{peers}-{name}-{code}": _timing(peers, rate)
        for peers in (2, 4)
        for name, rate in _RATES.items()
        for code in ("before", "after")
    },
}


def measure(job: Job, checkout: Path) -> dict[str, Any]:
    """Start the processes of a job with one checkout's code; return what they have measured."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    with hosts(job.hosts, job.rate, job.mtu) as cluster:
        each = job.processes // job.hosts
        launched = [
            (cluster[rank // each].name, variables)
            for rank, variables in enumerate(launches(cluster, each))
        ]
        words = [json.dumps(dataclasses.asdict(job)), json.dumps(launched)]
        command = [sys.executable, "-P", str(_WORKER), *words]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("exchange: a process failed, as printed above")
    found = sorted(map(json.loads, done.stdout.splitlines()), key=lambda one: one.pop("rank"))
    (commit,) = {one.pop("commit") for one in found}
    return {"job": dataclasses.asdict(job), "processes": found, "commit": commit}


# ---------------------------------------------------------------- in words


def received(processes: Sequence[Mapping[str, Any]], headers: int) -> Iterator[float]:
    """Yield the bytes a step that KL adds, of each process: the mean over its blocks.

    Args:
        processes: what they have measured.
        headers: bytes that are not counted, of each packet.
    """
    for one in processes:
        kinds = (
            [b - headers * packets for b, packets in one[name]] for name in ("mutual", "alone")
        )
        with_kl, without = map(mean, kinds)
        yield with_kl - without


def bytes_row(name: str, found: Mapping[str, Any]) -> list[str]:
    """Return a row of the table of bytes."""
    job, processes = Job(**found["job"]), found["processes"]
    predicted = job.predicted()
    cells = [name.removeprefix("bytes-"), f"{job.processes}", _from_to(predicted)]
    for headers in (0, _HEADERS):
        values = list(received(processes, headers))
        ratios = [value / one for value, one in zip(values, predicted, strict=True)]
        cells += [_from_to(values), f"{sum(ratios) / len(ratios):.2f}"]
    return [*cells, found["commit"][:8]]


def _from_to(values: Sequence[float]) -> str:
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"


def time_row(name: str, found: Mapping[str, Any]) -> list[str]:
    """Return a row of the table of times: of the first process."""
    first = found["processes"][0]
    steps, exchanges = first["step"], first["exchange"]
    shares = [exchange / step for exchange, step in zip(exchanges, steps, strict=True)]
    share = summarise(shares)
    _, peers, rate, code = name.split("-")
    return [
        peers,
        rate,
        code,
        f"{1e3 * median(steps):.0f}",
        f"{1e3 * median(exchanges):.2f}",
        f"{100 * median(shares):.2f}%",
        f"{100 * share.mean:.2f}% ({100 * share.low:.2f} to {100 * share.high:.2f})",
        f"{len(shares)}",
        found["commit"][:8],
    ]


def overlap_row(one: Mapping[str, Any]) -> list[str]:
    """Return a row of the table of the prototype's gain."""
    seconds = dict(one["seconds"])
    now = seconds.pop("now")
    return [
        one["network"],
        one["link"],
        f"{1e3 * median(now):.0f}",
        *(ratio(values, now).as_change() for values in seconds.values()),
        f"{len(now)}",
        one["commit"][:8],
    ]


def report(found: Mapping[str, Any]) -> str:
    """Return exchange.md."""
    measured = {name: found["measured"][name] for name in MEASUREMENTS if name in found["measured"]}
    counted = [bytes_row(name, one) for name, one in measured.items() if name.startswith("bytes")]
    timed = [time_row(name, one) for name, one in measured.items() if name.startswith("time")]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"""# What the exchange between peers costs

*Before*, every process sent its logits to every other one; *after*, processes exchange in blocks
the rows that each needs. The commits are in the tables.

## Bytes that a process receives in a step

{_markdown(COUNTED, counted)}

{BYTES}
## Share of a step

{_markdown(TIMED, timed)}

{TIMES}
## Overlap with the next forward

{_markdown(OVERLAPPED, [overlap_row(one) for one in found["overlap"]])}

{OVERLAP}
## Measured with

{found["processor"]}, {found["cores"]} cores, {found["system"]}; {versions}.
Command: `{found["command"]}`
"""


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


COUNTED = [
    "name",
    "processes",
    "plan",
    "on the link",
    "times plan",
    "without packet headers",
    "times plan",
    "commit",
]
BYTES = f"""The name says how many processes there are, for four peers on equally many; or how many
each of two peers has. One process on a host, 16 rows each (5-and-3: 60 images a batch, 6-and-2:
48), 100 classes where none are named; sum and bf16: 8 processes. Each value is the difference
between training with the mutual loss and with `--kl-weight 0`, in the same processes, 2 blocks of 6
steps of each in turn; a range is that over the processes. `plan` predicts payload after the change:
(K - 1) x rows x classes x bytes of a number. The counter is the link's `rx_bytes`, with everything
that comes: packets of up to 9,000 bytes, one segment each, acknowledgements, and the messages in
which gloo says that it is ready. Those are a fixed number for each process that is exchanged with,
so that they weigh less the more classes there are. The third value leaves out {_HEADERS} bytes a
packet (Ethernet, IP, TCP). ResNet-8 on 8 x 8 noise, without heartbeats; batch norm is local.
"""
TIMED = [
    "peers",
    "link",
    "code",
    "step, ms",
    "exchange, ms",
    "share, median",
    "mean (95% interval)",
    "steps",
    "commit",
]
TIMES = """ResNet-20 on noise of 32 x 32, batch 32, 100 classes; 4 processes of one thread on two
hosts, two on each. Four processes share two cores, so that a step takes about twice as long as with
a core for each. Two peers have two processes each, one host a peer; four peers one process each.
Both ends of each link are shaped by `tc qdisc ... tbf` with a burst of two packets of 1,500 bytes.
Each step waits for the slowest process before the exchange, which is left out of the step: the
share is that of the exchange alone, in the first process. With four peers, each alone on a process,
the change sends the same bytes.
"""


OVERLAPPED = [
    "peers",
    "link",
    "step, ms",
    "overlapped",
    "and the next batch read before the wait",
    "steps of each",
    "commit",
]
OVERLAP = """Four peers on two processes, two each, one process of one thread on a host; batch 32 of
32 x 32, 100 classes. In the columns of changes a peer's logits are sent (`all_gather` with
`async_op=True`) while the next peer of the process predicts, and waited for where the exchange is
now. Three cohorts with equal weights train in turn in the same two processes, a step of each, from
a barrier to a barrier; the change is the geometric mean of the ratios of steps with the same
number, with its 95% interval. Losses and weights of all three are equal, bit for bit. Another
training run took about a third of both cores meanwhile, so that the intervals are wide. What a
process receives, 25.6 kB, takes 2.0 ms of a link of 100 Mbit/s and 0.2 ms of one of 1 Gbit/s, at
most 0.6% and 0.1% of a step; the rest of the exchange is processor time, of which these cores have
none to spare. No gain was measured, so that the code is not kept.
"""


def main() -> int:
    """Measure what is named; write both files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exchange",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="measurements or patterns")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="older code to compare")
    parser.add_argument("--list", action="store_true", help="print the names of all measurements")
    asked = parser.parse_args()
    if asked.list:
        print(*MEASUREMENTS, sep="\n")
        return 0
    try:
        jobs = _chosen(asked.names, asked.before)
        check()
    except UsageError as error:
        print(f"exchange: {error}", file=sys.stderr)
        return error.exit_code
    path = HERE / "exchange.json"
    for name in jobs:
        checkout = asked.before.resolve() if name.endswith("-before") else HERE.parent
        result = measure(MEASUREMENTS[name], checkout)
        found = json.loads(path.read_text())
        found["measured"][name] = result
        command = ["python", "-m", "benchmarks.exchange", "--before", "CHECKOUT"]
        found |= {**surroundings(), "command": shlex.join(command)}
        path.write_text(json.dumps(found, indent=2) + "\n")
        (HERE / "exchange.md").write_text(report(found))
        row = bytes_row if name.startswith("bytes") else time_row
        print(*row(name, result), sep="  ", flush=True)
    return 0


def _chosen(patterns: Sequence[str], before: Path | None) -> list[str]:
    """Return the names of the measurements that are asked for.

    Raises:
        UsageError: a pattern names none, or there is no checkout for one.
    """
    found = []
    for pattern in patterns or ["*"]:
        names = fnmatch.filter(MEASUREMENTS, pattern)
        if not names:
            raise UsageError(f"no measurement is named {pattern}; --list prints all")
        found += names
    older = [name for name in found if name.endswith("-before")]
    if older and not (before and (before / "dml_accel").is_dir()):
        raise UsageError(f"{older[0]} needs --before and a checkout of dml_accel; it is {before}")
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    sys.exit(main())
