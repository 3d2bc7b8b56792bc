"""How the command line ends: its exit codes, and the one exception that a command raises to say why."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes, for scripts. `finetune run` returns the trainer's code (finetune_api.exit_codes.ExitCode) instead."""

    OK = 0
    INVALID = 1
    JOB_FAILED = 2
    UNREACHABLE = 3
    TIMED_OUT = 4
    CORRUPT = 5
    INTERRUPTED = 130


def install_hint(extra: str) -> str:
    """Return how to install what is missing. No package index holds this product."""
    return f"in a clone of its repository: pip install '.[{extra}]'"


class CliError(Exception):
    """What went wrong in one sentence, what the user can do about it, and the exit code.

    `message` may be empty when everything has been said already. `may_pass`: the same call may work in a moment.
    `is_denied`: the cluster knows the user, who lacks the right. `is_missing`: no object has that name.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        code: int = Exit.INVALID,
        may_pass: bool = False,
        is_denied: bool = False,
        is_missing: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = int(code)
        self.may_pass = may_pass
        self.is_denied = is_denied
        self.is_missing = is_missing


def same_place(namespace: str | None, context: str | None, kubeconfig: object = None) -> str:
    """Return the options that make the next command act where this one did."""
    given = {"-n": namespace, "--context": context, "--kubeconfig": kubeconfig}
    return "".join(f" {option} {value}" for option, value in given.items() if value)
