"""Accept a GPU: eleven parts in under ten minutes, each passed, failed or skipped with the reason.

    python -m benchmarks.gpu [--parts 3 5] [--again] [--minutes 10]
    python -m benchmarks.gpu --rehearse      the same on a CPU, smaller, without what needs a GPU

Writes benchmarks/gpu.json and gpu.md after every part. A part that has passed is not repeated, so
that the command can be given again after an interruption or a correction. Each part is a process
with a time limit: one that crashes or hangs does not end the others. Exit code 1 if a part failed.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOUND, LOG = "found.json", "log"
_PASSED, _FAILED, _SKIPPED = "passed", "failed", "skipped"
_LINES_OF_LOG = 40
_SLOWER_ON_A_CPU = 2  # a busy one
_LEAST_SECONDS = 10.0  # for a part that is still begun


def judge(found: Mapping[str, Any], code: int | None, seconds: float, log: str) -> tuple[str, str]:
    """Return whether a part has passed, failed or was skipped, and why.

    Args:
        found: what its process has written.
        code: of its process; None if it was given up.
        seconds: that it was given.
        log: what it has printed.
    """
    checks, during = found.get("checks", []), found.get("running")
    failed = [check for check in checks if check["result"] == _FAILED]
    reasons = [f"{check['name']}: {check['reason']}" for check in failed]
    where = f" in {during!r}" if during else ""
    if code is None:
        reasons.append(f"not done after {seconds:.0f} s{where}")
    elif code:
        said = [line.strip() for line in log.splitlines() if line.strip()]
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        reasons.append(
            f"its process ended with {ended}{where}: {(said or ['it said nothing'])[-1]}"
        )
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return _FAILED, reasons[0] + more
    skipped = [check for check in checks if check["result"] == _SKIPPED]
    why = "; ".join(dict.fromkeys(check["reason"] for check in skipped))
    if len(skipped) == len(checks):
        return _SKIPPED, why or "it made no check"
    passed = f"{len(checks) - len(skipped)} checks"
    return _PASSED, passed + (f"; {len(skipped)} skipped: {why}" if skipped else "")


def run_child(command: Sequence[str], folder: Path, seconds: float) -> tuple[int | None, str]:
    """Run a part's process; return its exit code and what it printed.

    Args:
        command: its words.
        folder: of the part.
        seconds: after which it is given up, with all processes that it started; the code is None.
    """
    log = folder / LOG
    with log.open("w") as output:
        child = subprocess.Popen(
            command, cwd=_ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # launchers leave their processes behind
            child.wait()
    return code, log.read_text(errors="replace")


def run_part(number: int, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own; return its record."""
    from dml_accel.core.errors import UnreadableError
    from dml_accel.core.files import read_json

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dml-gpu-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "benchmarks.gpu_parts", "part", str(number), name]
        code, log = run_child(command, folder, seconds)
        try:
            found = read_json(folder / FOUND)
        except UnreadableError:
            found = {}
    result, reason = judge(found, code, seconds, log)
    record = {
        "result": result,
        "reason": reason,
        "seconds": round(time.perf_counter() - started, 1),
        "checks": found.get("checks", []),
    }
    if result == _FAILED:
        record["log"] = log.splitlines()[-_LINES_OF_LOG:]
    return record


def to_run(
    numbers: Sequence[int], asked: Sequence[int], kept: Mapping[str, Any], again: bool
) -> list[int]:
    """Return the parts to run: those asked for, or all, without those that have passed."""
    wanted = [number for number in numbers if number in asked or not asked]
    done = [int(number) for number, record in kept.items() if record["result"] == _PASSED]
    return wanted if again else [number for number in wanted if number not in done]


# ---------------------------------------------------------------- the report


def rows(parts: Mapping[str, Any], titles: Mapping[int, str]) -> list[list[str]]:
    """Return the rows of the table: number, title, result, seconds, reason."""
    found = []
    for number, title in titles.items():
        record = parts.get(str(number))
        cells = ["not run", "", ""]
        if record:
            cells = [record["result"], f"{record['seconds']:.0f}", record["reason"]]
        found.append([str(number), title, *cells])
    return found


def speeds(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what part 9 measured, a row for each mode."""
    checks = parts.get("9", {}).get("checks", [])
    return [{"mode": c["name"], **c["numbers"]} for c in checks if c.get("numbers")]


def markdown(content: Mapping[str, Any], titles: Mapping[int, str]) -> str:
    """Return gpu.md."""
    from tabulate import tabulate

    heads = ["", "part", "result", "s", "checks, or why"]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows(content["parts"], titles)]
    text = "# Acceptance of a GPU\n\n"
    if content["rehearsal"]:
        text = "# Rehearsal on a CPU: nothing here was run on a GPU\n\n"
    text += tabulate(cells, heads, tablefmt="github", disable_numparse=True) + "\n\n"
    if measured := speeds(content["parts"]):
        what = "a small pair, to rehearse" if content["rehearsal"] else "4 ResNet-32, 100 classes"
        text += f"Part 9: {what}, batch 64, whole steps.\n\n"
        text += tabulate(measured, headers="keys", tablefmt="github") + "\n\n"
    where = ", ".join(f"{n} {v or 'unknown'}" for n, v in content["versions"].items())
    text += f"{content['processor']}, {content['cores']} cores, {content['system']}; {where}; "
    text += f"commit {content['commit']}; {content['date']}. Command: `{content['command']}`\n"
    return text


# ---------------------------------------------------------------- the command

_ROOT = Path(__file__).parent.parent


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", type=int, nargs="+", default=[], help="numbers (default: all)")
    parser.add_argument("--again", action="store_true", help="repeat parts that have passed")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, smaller")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of all parts together (default: 10)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file; a .md is written beside it (default: benchmarks/gpu.json)",
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts that are left; return the exit code."""
    parser = _parser()
    given = parser.parse_args(words)
    os.environ["DML_TEST_DEVICE"] = "cpu" if given.rehearse else "cuda"
    import torch

    if not given.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --rehearse runs on a CPU what a CPU can")
    from benchmarks.gpu_parts import PARTS
    from benchmarks.measuring import surroundings
    from dml_accel.core.tables import table

    if unknown := sorted(set(given.parts) - PARTS.keys()):
        parser.error(f"--parts {unknown[0]}: there are parts 1 to {max(PARTS)}")
    out = given.out or (None if given.rehearse else _ROOT / "benchmarks/gpu.json")
    titles = {number: part.title for number, part in PARTS.items()}
    content = {"format": 1, "rehearsal": given.rehearse, **surroundings()}
    typed = sys.argv[1:] if words is None else words
    content["command"] = "python " + shlex.join(["-m", "benchmarks.gpu", *typed])
    content["date"] = time.strftime("%Y-%m-%d")
    content["parts"] = _kept(out, content)
    deadline = time.monotonic() + 60 * given.minutes
    for number in to_run(list(PARTS), given.parts, content["parts"], given.again):
        left = deadline - time.monotonic()
        print(f"part {number}, {titles[number]} ...", file=sys.stderr, flush=True)
        record = {"result": _SKIPPED, "reason": "no time was left", "seconds": 0.0, "checks": []}
        if left < _LEAST_SECONDS:  # what was found before still holds
            record = content["parts"].get(str(number), record)
        else:
            limit = PARTS[number].seconds * (_SLOWER_ON_A_CPU if given.rehearse else 1)
            record = run_part(number, min(limit, left))
            record |= {"commit": content["commit"], "date": content["date"]}
        content["parts"][str(number)] = record
        print(f"    {record['result']}: {record['reason']}", file=sys.stderr, flush=True)
        for line in record.get("log", [])[-5:]:
            print(f"    | {line}", file=sys.stderr)
        _write(out, content, titles)
    heads = ("", "part", "result", "s", "checks, or why")
    print(table(rows(content["parts"], titles), heads, "simple", left=5))
    if measured := speeds(content["parts"]):
        names = list(dict.fromkeys(name for one in measured for name in one))
        print(
            "\n" + table([[one.get(n, "") for n in names] for one in measured], names, "simple", 1)
        )
    failed = [n for n, record in content["parts"].items() if record["result"] == _FAILED]
    return int(bool(failed))


def _kept(out: Path | None, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts that were run here before; those of another machine do not count."""
    from dml_accel.core.files import read_json

    if out is None or not out.exists():
        return {}
    found = read_json(out)
    same = all(found.get(n) == content[n] for n in ("versions", "rehearsal", "processor"))
    if not same:
        print(f"{out} is of another machine or other versions; starting again", file=sys.stderr)
        return {}
    return dict(found["parts"])


def _write(out: Path | None, content: Mapping[str, Any], titles: Mapping[int, str]) -> None:
    from dml_accel.core.files import write_json, write_text

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, content)
        write_text(out.with_suffix(".md"), markdown(content, titles))


if __name__ == "__main__":
    sys.exit(main())
