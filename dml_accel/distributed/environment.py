"""What launchers say in environment variables: read and checked here, and nowhere else.

    check               for every command: what makes no sense, and copies without a world
    check_launcher      for training: what launchers do, and what accelerate may be set to
    launched            the world of this process
    shown_to_accelerate the environment that Accelerate reads

A variable that is empty is as good as unset. WORLD_SIZE says how many processes there are; without
it there is one, and what else is left over from a launcher counts for nothing. No torch here.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dml_accel.core.errors import UsageError

_START = "start with torchrun or accelerate launch; for one process unset"
_OF_A_PROCESS = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_LAST_PORT = 65_535
_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_NUMBERS = ("WORLD_SIZE", *_OF_A_PROCESS, *_ADDRESS, _RESTARTS, "OMP_NUM_THREADS")
# Who starts copies, the variable for their number, and the one for our place among them.
_COPIES = (
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("mpirun", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    ("mpirun", "PMIX_RANK", "PMIX_RANK"),  # PMIx tells no number
)
# What Accelerate reads of these.
_MPI = re.compile(
    r"(OMPI_COMM_WORLD|MV2_COMM_WORLD|PMI)_(LOCAL_)?(RANK|SIZE)|MPI_LOCAL(NRANKS|RANKID)"
)
# Set by a command of ours for processes that it starts: its process id.
OWN = "DML_OWN_PROCESSES"
_PRECISION = "ACCELERATE_MIXED_PRECISION"  # every accelerate launch sets it
PRECISIONS = ("no", "bf16", "fp16")
_ON, _OFF = ("1", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f")
_PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
_SAGEMAKER = "ACCELERATE_USE_SAGEMAKER"
_SWITCHES = (
    *_PLUGINS,
    _SAGEMAKER,
    "ACCELERATE_USE_CPU",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_CPU_AFFINITY",
    "FORK_LAUNCHED",
)


@dataclass(frozen=True)
class World:
    """The processes of a run, as the launcher describes them to one of them.

    Attributes:
        size: how many there are.
        rank: of this process.
        local_size: how many are on this machine; None if the launcher does not say.
        local_rank: of this process among those; None if the launcher does not say.
        restarts: how often the launcher has restarted all of them.
    """

    size: int = 1
    rank: int = 0
    local_size: int | None = None
    local_rank: int | None = None
    restarts: int = 0


# ---------------------------------------------------------------- one variable


def _value(name: str) -> str:
    return os.environ.get(name, "").strip()


def _number(name: str, least: int, most: int | None = None, remedy: str = "") -> int | None:
    """Return the number in a variable; None if it is not set.

    Raises:
        UsageError: it is no whole number, or out of range.
    """
    value = _value(name)
    if not value:
        return None
    with contextlib.suppress(ValueError):
        number = int(value)
        if least <= number and (most is None or number <= most):
            return number
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise UsageError(
        f"{name} is {value!r}; it must be a whole number {allowed}: {remedy or 'unset it'}"
    )


def _switch(name: str) -> bool:
    """Return whether a variable says yes; it does not if it is not set.

    Raises:
        UsageError: it says neither yes nor no.
    """
    value = _value(name).lower()
    if value and value not in _ON + _OFF:
        raise UsageError(f"{name} is {_value(name)!r}; it must be true or false: unset it")
    return value in _ON


# ---------------------------------------------------------------- the world


def world() -> World:
    """Return the processes of this run.

    Raises:
        UsageError: a variable is missing, no number or out of range.
    """
    size = _number("WORLD_SIZE", 1)
    if size is None:
        for name in _OF_A_PROCESS:
            if _value(name):
                raise UsageError(
                    f"{name} is {_value(name)!r} but WORLD_SIZE is not set: {_START} it"
                )
        return World()
    within = f"WORLD_SIZE is {size}"
    rank = _number("RANK", 0, size - 1, within)
    local_size = _number("LOCAL_WORLD_SIZE", 1, size, within)
    if local_size:
        within = f"LOCAL_WORLD_SIZE is {local_size}"
    local_rank = _number("LOCAL_RANK", 0, (local_size or size) - 1, within)
    if size > 1:
        for name in ("RANK", "MASTER_ADDR"):
            if not _value(name):
                raise UsageError(f"WORLD_SIZE is {size} but {name} is not set: {_START} WORLD_SIZE")
        _number("MASTER_PORT", 1, _LAST_PORT, "set it to a free port of MASTER_ADDR")
    restarts = _number(_RESTARTS, 0)
    return World(size, rank or 0, local_size, local_rank, restarts or 0)


def launched() -> World:
    """Return the processes of this run; a single one where ``check`` refuses the variables.

    It does not raise, so that an error can be printed in any environment.
    """
    try:
        return world()
    except UsageError:
        return World()


def check() -> None:
    """Refuse variables that make no sense, and copies without a world; unset empty variables.

    Libraries would take an empty variable for a value.

    Raises:
        UsageError: the text names the variable, its value and the fix.
    """
    for name, value in list(os.environ.items()):
        if not value.strip() and (name in _NUMBERS or name.startswith("ACCELERATE_")):
            del os.environ[name]
    world()
    _refuse_copies()
    threads()
    for name in _SWITCHES:
        _switch(name)
    level = _value("ACCELERATE_LOG_LEVEL").upper()
    if level and level not in logging.getLevelNamesMapping():
        raise UsageError(f"ACCELERATE_LOG_LEVEL is {level!r}; use INFO or WARNING, or unset it")
    if device := _value("ACCELERATE_TORCH_DEVICE"):
        raise UsageError(
            f"ACCELERATE_TORCH_DEVICE is {device!r}, which is not supported: unset it, and choose "
            "a GPU with CUDA_VISIBLE_DEVICES, or the CPU with --cpu"
        )


def _refuse_copies() -> None:
    """Refuse to be one of several copies of a program that know nothing of each other."""
    if _value("WORLD_SIZE"):
        return
    for starter, number, place in _COPIES:
        if starter == "srun" and not _value(number) and _value("SLURM_STEP_ID"):
            number = "SLURM_NTASKS"  # of the step here; in a batch script, of the whole job
        for name, most in ((number, 1), (place, 0)):
            if (_number(name, 0) or 0) > most:
                raise UsageError(
                    f"{name} is {_value(name)} but WORLD_SIZE is not set: {starter} has started "
                    "copies that know nothing of each other; start torchrun once on each machine, "
                    "as launch/slurm.sh does, or set WORLD_SIZE=1 if each is to work alone"
                )


# ---------------------------------------------------------------- what else launchers set


def threads() -> int | None:
    """Return the threads of this process in OMP_NUM_THREADS; None if it is not set.

    OpenMP knows lists, one number for each level of nesting; the first one counts.

    Raises:
        UsageError: it is no whole number above 0.
    """
    numbers = _value("OMP_NUM_THREADS").split(",")
    if numbers == [""]:
        return None
    try:
        counts = [int(number) for number in numbers]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UsageError(
            f"OMP_NUM_THREADS is {_value('OMP_NUM_THREADS')!r}; it must be a whole number of at "
            "least 1: set it to the threads of each process, or unset it"
        )
    return counts[0]


def uses_cpu() -> bool:
    """Return whether the launcher asks for the CPU."""
    return _switch("ACCELERATE_USE_CPU")


def precision() -> str:
    """Return the launcher's mixed precision: ``no``, ``bf16`` or ``fp16``.

    Raises:
        UsageError: it is another one.
    """
    value = _value(_PRECISION).lower() or "no"
    if value not in PRECISIONS:
        raise UsageError(
            f"mixed precision {value} is not supported; {_PRECISION} must be no, bf16 or fp16"
        )
    return value


def starter() -> int | None:
    """Return the process id of the command that has started this process; None for all others."""
    value = _value(OWN)
    return int(value) if value.isdecimal() and _value("WORLD_SIZE") else None


def has_launcher() -> bool:
    """Return whether a launcher has started this process, be it alone."""
    return any(map(_value, ("WORLD_SIZE", "TORCHELASTIC_RUN_ID", _PRECISION)))


def started_by_torch() -> bool:
    """Return whether a launcher of torch has started this process, beside its other ones."""
    return bool(_value("TORCHELASTIC_RUN_ID"))


def check_launcher() -> None:
    """Refuse to train as launchers do not start it, or as accelerate may be configured.

    Raises:
        UsageError: the text names the fix.
    """
    if _was_meant_to_be_several():
        raise UsageError(
            f"MASTER_ADDR is {_value('MASTER_ADDR')} but RANK is not set: accelerate launch "
            "started a single process and ignored --num_processes and --num_machines, as it does "
            "with --cpu, with MULTI_CPU and without --multi_gpu; write accelerate launch "
            "--multi_gpu --num_processes N, which starts N processes on the CPU if there is no "
            "GPU; for one process unset MASTER_ADDR"
        )
    for variable, plugin in _PLUGINS.items():
        if _switch(variable):
            raise UsageError(
                f"{plugin} does not work with a cohort of networks ({variable} is "
                f"{_value(variable)}); launch without it"
            )
    if _switch(_SAGEMAKER) and _value("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE").upper() != "NO":
        raise UsageError(f"SageMaker's data parallelism is not supported; unset {_SAGEMAKER}")
    backend = _value("ACCELERATE_DYNAMO_BACKEND")
    if backend.upper() not in ("", "NO"):
        raise UsageError(
            f"the launcher's --dynamo_backend (ACCELERATE_DYNAMO_BACKEND is {backend}) would "
            "compile behind the run's back; launch without it and give train.py --compile"
        )
    steps = _number("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1)
    if steps and steps > 1:
        raise UsageError(
            "gradient accumulation is set with train.py --grad-accum, not with the launcher "
            f"(ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps})"
        )


def _was_meant_to_be_several() -> bool:
    """Whether accelerate launch was asked for several processes, and has started this one alone.

    It then sets an address, though no rank. A user may have exported an address too: it is also in
    the environment that the launcher was started with. Where both gave the same address, or where
    the system does not tell, the launcher's words decide; without these, it was several.
    """
    if not _value(_PRECISION) or _value("WORLD_SIZE") or not all(map(_value, _ADDRESS)):
        return False
    found = _launcher()
    if found is None:
        return True
    environment, words = found
    numbers = re.findall(r"--num[-_](?:processes|machines)[ =]+(\d+)", words)
    was_set = any(environment.get(name, "") != os.environ[name] for name in _ADDRESS)
    return was_set or any(int(number) > 1 for number in numbers)


def _launcher() -> tuple[dict[str, str], str] | None:
    """Return the environment and the command line of the launcher; None if they cannot be told.

    It is the nearest of the processes that we descend from without what it gives to its own.
    """
    process = os.getppid()
    with contextlib.suppress(OSError, ValueError):
        while process > 1:
            folder = Path("/proc") / str(process)
            lines = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            environment = dict(line.split("=", 1) for line in lines if "=" in line)
            if _PRECISION not in environment:
                words = (folder / "cmdline").read_bytes().decode(errors="replace")
                return environment, words.replace("\0", " ")
            process = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    return None


# ---------------------------------------------------------------- Accelerate


@contextlib.contextmanager
def shown_to_accelerate(threads_now: int) -> Iterator[None]:
    """Within the context, Accelerate finds what ``check`` has seen, and nothing left over.

    It would join a group of its own for a rank without a world, take the numbers of MPI for ours,
    and replace the number of threads where none is set.

    Args:
        threads_now: of this process.
    """
    size = launched().size
    hidden = {}
    for name in list(os.environ):
        alone = size == 1 and name in ("WORLD_SIZE", *_OF_A_PROCESS)
        if alone or _MPI.fullmatch(name) or name.startswith("ACCELERATE_DYNAMO_"):
            hidden[name] = os.environ.pop(name)
    if size > 1:
        os.environ.setdefault("MASTER_PORT", "29500")  # Accelerate's own, on a CPU
        if "OMP_NUM_THREADS" in os.environ:
            hidden["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
        os.environ["OMP_NUM_THREADS"] = str(threads() or threads_now)
    try:
        yield
    finally:
        os.environ.update(hidden)
