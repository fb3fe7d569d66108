"""Every error that ends a command, and the exit code of the process. No torch here."""


class UsageError(ValueError):
    """Wrong usage or input. The text is one line: what, where, the values and the fix."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that ended without results.

    Attributes:
        exit_code: of the process.
        prints: whether this process prints the text; None where rank 0 does.
    """

    exit_code = 1

    def __init__(self, message: str, prints: bool | None = None) -> None:
        super().__init__(message)
        self.prints = prints


class StoppedError(RunError):
    """The run was stopped on request, after a checkpoint was written."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, which schedulers read as "try again"


class DivergedError(RunError):
    """A peer's loss stays non-finite or out of bounds; the text names the peer and the step."""


class OutOfMemoryError(RunError):
    """A tensor could not be allocated; the text names the flags that need less memory."""


class ProcessLostError(RunError):
    """Other processes of the run are gone; the text names them."""


class CheckpointNotWrittenError(RunError):
    """A checkpoint could not be written; the text says why, and which one is the newest."""


class OwnProcessesEndedError(RunError):
    """The processes that a command has started have ended, well or not, and have said how.

    Args:
        exit_code: that the command ends with; 0 if all is well.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"its processes ended with exit code {exit_code}", prints=False)
        self.exit_code = exit_code


class UnreadableError(UsageError):
    """A file is missing, damaged, malformed or longer than allowed; the text names it."""


def one_line(error: BaseException) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split())
