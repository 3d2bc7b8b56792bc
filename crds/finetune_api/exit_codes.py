"""The trainer's exit codes, and what each means to the operator and to the user."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class ExitCode(IntEnum):
    """What the trainer's exit code says. Numbers follow BSD sysexits.h where it has one."""

    SUCCEEDED = 0
    DATASET_INVALID = 65  # EX_DATAERR
    UNAVAILABLE = 69  # EX_UNAVAILABLE
    PREEMPTED = 75  # EX_TEMPFAIL
    ACCESS_DENIED = 77  # EX_NOPERM
    CONFIG_INVALID = 78  # EX_CONFIG
    GPU_OUT_OF_MEMORY = 90
    DIVERGED = 91
    GPU_UNAVAILABLE = 92
    KILLED = 137  # 128 + SIGKILL


#: Reason of a run that ended well, but whose adapter was not published.
GATE_NOT_PASSED: Final = "GateNotPassed"
#: Reason of a trial that its sweep stopped early.
OUTPERFORMED: Final = "Outperformed"
#: Reason of trials that cannot share a process, which only the loaded model tells.
NOT_PACKABLE: Final = "NotPackable"
#: Reason of a run that needs more GPU memory than there is.
WONT_FIT: Final = "WontFit"


@dataclass(frozen=True)
class Outcome:
    """One way an attempt ends: the reason shown in status, whether another attempt could help, and what to do."""

    code: int
    reason: str
    final: bool
    cause: str
    cure: str
    cure_here: str = ""
    """What to do where it ran without a cluster, if that is something else."""


#: Of two outcomes with one exit code, the first is what the code alone says; who tells the other is said beside it.
_OUTCOMES: Final = (
    Outcome(
        ExitCode.SUCCEEDED,
        "Succeeded",
        True,
        "The adapter is published and was loaded back.",
        "Nothing to do: download the adapter.",
    ),
    Outcome(  # told by the trainer's report
        ExitCode.SUCCEEDED,
        GATE_NOT_PASSED,
        True,
        "The adapter is trained and whole, but does not meet publish.onlyIf: it is kept below candidates/.",
        "status.gate says which check failed. To serve it all the same: finetune promote, with status.candidate.uri.",
    ),
    Outcome(
        ExitCode.DATASET_INVALID,
        "DatasetInvalid",
        True,
        "A data file is missing, empty, or has rows the trainer cannot read.",
        "Fix the file and line the message names, then create the job again.",
        "Fix the file and line the message names, and run it again.",
    ),
    Outcome(
        ExitCode.UNAVAILABLE,
        "Unavailable",
        False,
        "The object store or the model hub did not answer, or kept answering with server errors.",
        "It is retried with backoff. If it lasts: check the endpoint, DNS and NetworkPolicies.",
        "Run it again once the endpoint answers. If it lasts: check AWS_ENDPOINT_URL, HF_ENDPOINT, DNS and proxies.",
    ),
    Outcome(
        ExitCode.PREEMPTED,
        "Preempted",
        False,
        "The pod was asked to stop (node drained, spot reclaimed, job suspended) and saved a checkpoint.",
        "Nothing to do: the next attempt resumes, and this one is not counted.",
        "Run the same command again: it resumes from the last checkpoint, if one was saved.",
    ),
    Outcome(
        ExitCode.ACCESS_DENIED,
        "AccessDenied",
        True,
        "The store or the hub refused the credentials, or they do not allow this path.",
        "Check the Secret named by secretRef and what its key may read or write.",
        "Check the keys in the environment (AWS_*, HF_TOKEN) and what they may read or write.",
    ),
    Outcome(
        ExitCode.CONFIG_INVALID,
        "ConfigInvalid",
        True,
        "The manifest asks for something that cannot be done.",
        "Change the field the message names.",
    ),
    Outcome(  # told by the trainer's report
        ExitCode.CONFIG_INVALID,
        WONT_FIT,
        True,
        "The run needs more GPU memory than the GPU has, found before the weights were loaded.",
        "Take one of the changes the message lists.",
    ),
    Outcome(  # told by the trainer's report
        ExitCode.CONFIG_INVALID,
        NOT_PACKABLE,
        True,
        "Trials cannot share this base model, or their adapters do not allow it.",
        "Nothing to do: each trial goes on in a FineTuneJob of its own.",
    ),
    Outcome(
        ExitCode.GPU_OUT_OF_MEMORY,
        "GpuOutOfMemory",
        False,
        "The GPU ran out of memory while training.",
        "It is retried with half the micro-batch and the same effective batch. At micro-batch 1: lower maxLength.",
        "Lower training.maxLength, or free the GPU of other programs, and run it again: it resumes.",
    ),
    Outcome(
        ExitCode.DIVERGED,
        "Diverged",
        True,
        "The loss became NaN or infinite.",
        "Lower learningRate, raise warmupRatio, or look at the data around the step named.",
    ),
    Outcome(
        ExitCode.GPU_UNAVAILABLE,
        "GpuUnavailable",
        False,
        "The node gave the pod no GPU, or CUDA does not start there: its GPU driver or device plugin is at fault.",
        "It is retried, on another node if one is free. Repair the named node: its driver, then its device plugin.",
        "Does nvidia-smi show the GPU? If not, its driver is at fault. resources.gpusPerNode=0 trains on the CPU.",
    ),
    Outcome(
        ExitCode.KILLED,
        "Killed",
        False,
        "The container was killed (SIGKILL), and not for reaching its memory limit.",
        "It is retried. If it lasts: look at the node (memory pressure, its kernel log) and at who may kill there.",
        "Run it again: it resumes. If it lasts: the kernel's log (dmesg) tells whether the memory ran out.",
    ),
    Outcome(  # told by the kubelet
        ExitCode.KILLED,
        "OOMKilled",
        True,
        "The kernel ended the container: its host memory reached its limit, or the node had none left.",
        "Set resources.memory above the limit that the message names; where it names none, set one.",
    ),
    Outcome(  # told by the kubelet
        ExitCode.KILLED,
        "StorageLimitExceeded",
        True,
        "The pod wrote more to a volume of its own (scratch, shm) or to its disk than it may: the kubelet ended it.",
        "Volume shm: raise resources.sharedMemory. Volume scratch or the pod's disk: use cache, so that the model is"
        " not downloaded there, or ask the administrator to raise trainer.scratchSizeLimit or the namespace's limit.",
    ),
)


#: Every outcome by its reason.
REASONS: Final[dict[str, Outcome]] = {outcome.reason: outcome for outcome in _OUTCOMES}


#: What each exit code says by itself.
OUTCOMES: Final[dict[int, Outcome]] = {outcome.code: outcome for outcome in reversed(_OUTCOMES)}


def outcome_of(code: int, reason: str | None = None) -> Outcome | None:
    """Return the outcome of an exit code; where several share it, the one that `reason` names."""
    named = REASONS.get(reason or "")
    return named if named and named.code == code else OUTCOMES.get(code)


#: Exit codes after which a second attempt would fail in the same way, whatever the reason.
FINAL_EXIT_CODES: Final = tuple(
    sorted(
        int(code) for code in OUTCOMES if code and all(outcome.final for outcome in _OUTCOMES if outcome.code == code)
    )
)
