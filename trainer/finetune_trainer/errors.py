"""How a run fails: one exception per exit code, and the sentence that the user reads."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Final

from finetune_api.exit_codes import NOT_PACKABLE, OUTCOMES, WONT_FIT, ExitCode
from finetune_api.manifest import ManifestError
from finetune_trainer.redact import redacted

#: Exit code of a failure nobody foresaw, and its reason.
UNEXPECTED: Final = 1
UNEXPECTED_REASON: Final = "Error"
#: Characters of a library's message that are shown.
_LONGEST: Final = 400


class TrainerError(Exception):
    """A foreseen failure. Its text is one sentence for the user: what is wrong, where, what is allowed.

    Attributes:
        exit_code: What the trainer exits with if nobody handles the error.
        reason: The reason in the job's status, where the exit code alone does not tell it.
    """

    exit_code: ClassVar[ExitCode]
    reason: ClassVar[str | None] = None


class ConfigInvalid(TrainerError):
    """The manifest asks for something that cannot be done."""

    exit_code = ExitCode.CONFIG_INVALID


class DatasetInvalid(TrainerError):
    """A data file is missing, empty, or has rows that cannot be used."""

    exit_code = ExitCode.DATASET_INVALID


class WontFit(TrainerError):
    """The plan needs more GPU memory than there is."""

    exit_code = ExitCode.CONFIG_INVALID
    reason = WONT_FIT


class NotPackable(ConfigInvalid):
    """Trials cannot share a process: each must train alone."""

    reason = NOT_PACKABLE


class Preempted(TrainerError):
    """The process was asked to stop."""

    exit_code = ExitCode.PREEMPTED


class GpuOutOfMemory(TrainerError):
    """The GPU ran out of memory and no smaller micro-batch is left, or none may be tried."""

    exit_code = ExitCode.GPU_OUT_OF_MEMORY


class GpuUnavailable(TrainerError):
    """This node has no GPU that works, though it should."""

    exit_code = ExitCode.GPU_UNAVAILABLE


class Diverged(TrainerError):
    """The loss became NaN or infinite."""

    exit_code = ExitCode.DIVERGED


class Outperformed(Exception):
    """A trial fell behind others at a rung of its sweep: it ends with a checkpoint, and publishes nothing."""


#: Exit codes of exceptions that are not ours.
_FOREIGN: Final[dict[type[BaseException], ExitCode]] = {
    ManifestError: ExitCode.CONFIG_INVALID,
    KeyboardInterrupt: ExitCode.PREEMPTED,
}


@dataclass(frozen=True)
class Failure:
    """How a run ends: the process's exit code, status's reason, and one sentence."""

    exit_code: int
    reason: str
    message: str


def failure_of(error: BaseException) -> Failure:
    """Return the failure that `error` means; anything unforeseen is exit code 1 with a short sentence."""
    code = _exit_code(error)
    if code is not None:
        reason = (error.reason if isinstance(error, TrainerError) else None) or OUTCOMES[code].reason
        return Failure(int(code), reason, _text(error))
    return Failure(
        UNEXPECTED, UNEXPECTED_REASON, f"Unexpected {type(error).__name__}: {_text(error)}. The log has the traceback."
    )


def copy_of(error: BaseException, cause: BaseException | None) -> BaseException:
    """Return `error` for one of several threads that raise it: each adds its own traceback."""
    try:
        found = type(error).__new__(type(error), *error.args)  # its __init__ may take something else than args
        found.__dict__.update(error.__dict__)
        says_the_same = str(found) == str(error)
    except Exception:  # of a type that is written in C or Rust
        says_the_same = False
    if not says_the_same:
        found = RuntimeError(str(error))
    found.__cause__ = cause
    return found


def is_gpu_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is CUDA's out-of-memory (by name: this module does not import torch)."""
    return any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__)


@contextmanager
def weights_must_fit(source: str, bits: int) -> Iterator[None]:
    """Turn GPU out-of-memory while the weights of `source` load into WontFit: no micro-batch can help there."""
    try:
        yield
    except Exception as error:
        if not is_gpu_out_of_memory(error):
            raise
        fewer = "" if bits == 4 else "set quantization.bits: 4, or "
        raise WontFit(
            f"spec.model.source: the {bits}-bit weights of {source} do not fit in GPU memory: {fewer}use a larger GPU"
        ) from error


def _exit_code(error: BaseException) -> ExitCode | None:
    if isinstance(error, TrainerError):
        return error.exit_code
    if is_gpu_out_of_memory(error):
        return ExitCode.GPU_OUT_OF_MEMORY
    return next((code for kind, code in _FOREIGN.items() if isinstance(error, kind)), None)


def _text(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "Interrupted; run again to resume from the last checkpoint"
    text = redacted(str(error).strip())
    if isinstance(error, TrainerError | ManifestError) or not text:
        return text
    return text.splitlines()[0].rstrip(".")


def first_line(error: BaseException) -> str:
    """Return the first line of the text of `error`, without secrets; '' if it has none."""
    return (redacted(str(error)).strip().splitlines() or [""])[0]


def reason(error: BaseException) -> str:
    """Return the first line of the text of `error`, or the name of its type."""
    return first_line(error) or type(error).__name__


def whole_text(error: BaseException) -> str:
    """Return the text of `error` on one line, cut where it is too long to read; the name of its type if it has none."""
    return textwrap.shorten(str(error), _LONGEST, placeholder=" …") or type(error).__name__


def type_and_reason(error: BaseException) -> str:
    """Return the name of the type of `error` and the first line of its text."""
    return f"{type(error).__name__}: {first_line(error)}"
