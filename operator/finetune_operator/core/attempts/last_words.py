"""What a trainer's container left behind: its final report, or the last lines of its log."""

from pydantic import ValidationError
from pydantic_core import from_json

from finetune_api.status import TrainerReport
from finetune_operator.core.attempts.progress import TERMINAL_STAGES
from finetune_operator.core.objects import raw
from finetune_operator.core.objects.pod import Pod
from finetune_operator.core.objects.raw import Raw

_TAIL_LINES, _TAIL_LENGTH = 3, 600


def final_report(pod: Pod) -> TrainerReport | None:
    """Return the report in the pod's termination message; None where there is none that can be read.

    When the trainer left no message, the kubelet puts log lines there. Those are JSON too, but only a final report has
    a final stage.
    """
    if pod.exit is None or not pod.exit.message.lstrip().startswith("{"):
        return None
    report = _read(_whole_fields(pod.exit.message))
    return report if report and report.stage in TERMINAL_STAGES else None


def _whole_fields(message: str) -> Raw:
    """Return the fields of a JSON object that are whole.

    The kubelet divides 12 KiB among the containers of a pod, and cuts a message anywhere.
    """
    try:
        found = from_json(message)
    except ValueError:
        try:
            found = from_json(message, allow_partial=True)
        except ValueError:
            return {}
        if isinstance(found, dict) and found:
            found.popitem()  # the last one may be cut: of 1234 maybe 12 is left
    return found if isinstance(found, dict) else {}


def _read(fields: Raw) -> TrainerReport | None:
    """Return the report without the fields that cannot be read."""
    try:
        return TrainerReport.model_validate(fields)
    except ValidationError as error:
        wrong = {item["loc"][0] for item in error.errors(include_url=False, include_input=False) if item["loc"]}
    kept = {name: value for name, value in fields.items() if name not in wrong}
    try:
        return TrainerReport.model_validate(kept)
    except ValidationError:
        return None


def last_lines(message: str) -> str:
    """Return the end of a log, each line on one of its own; lines of JSON are reduced to their message."""
    lines = [line for line in map(_log_text, message.strip().splitlines()) if line]
    return "\n".join(lines[-_TAIL_LINES:])[-_TAIL_LENGTH:]


def _log_text(line: str) -> str:
    try:
        found = from_json(line)
    except ValueError:
        return line.strip()
    return (raw.text(found, "event") or raw.text(found, "message") or line).strip()
