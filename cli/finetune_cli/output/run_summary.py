"""What `finetune run` says at the end: where the adapter lies, what it gained, what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api import exit_codes, uri
from finetune_cli.errors import Exit
from finetune_cli.manifests import STDIN
from finetune_cli.output import console, formatting

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJob
    from finetune_api.status import TrainerReport

#: Metrics compared before and after, with their titles; the first is a loss, the others are shares of 1.
COMPARED = (
    ("evalLoss", "Held-out loss"),
    ("accuracy", "Right labels"),
    ("f1", "F1"),
    ("validJson", "Valid JSON"),
)
#: What shows more of a failure, by its reason.
_LOOKS = {"WontFit": "plan", "GpuOutOfMemory": "plan"}


def read_report(path: Path) -> TrainerReport | None:
    """Return the trainer's last word, or None when it left none."""
    from pydantic import ValidationError

    from finetune_api.status import TrainerReport

    try:
        return TrainerReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def gains(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Title and 'before → after' of every metric that has an after."""
    rows = []
    for key, title in COMPARED:
        after, before = metrics.get(key), metrics.get(f"{key}Before")
        if after is None:
            continue
        show = formatting.loss if key == "evalLoss" else formatting.percent
        rows.append((title, show(after) if before is None else f"{show(before)} → {show(after)}"))
    return rows


def local_path(address: str) -> str:
    """Return a file:// URI as a path; any other unchanged."""
    return address.removeprefix("file://").rstrip("/") if address.startswith("file://") else address


def base_argument(job: FineTuneJob) -> str:
    """Return what from_pretrained takes for the base model, as Python source."""
    model = job.spec.model
    parsed = uri.parse(model.source)
    if parsed.scheme == "hf":
        return f'"{parsed.authority}"' + (f', revision="{model.revision}"' if model.revision else "")
    return f'"{local_path(model.source)}"'


def load_lines(job: FineTuneJob, folder: str) -> list[str]:
    """Return the five lines of Python that load the adapter in `folder` on its base model."""
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"base = AutoModelForCausalLM.from_pretrained({base_argument(job)})",
        f'model = PeftModel.from_pretrained(base, "{folder}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
    ]


def show(job: FineTuneJob, report: TrainerReport | None, code: int, *, seconds: float, file: str) -> None:
    """Print the summary of a run that ended with `code` after `seconds`."""
    if code == Exit.OK:
        _show_success(job, report, seconds, file)
    else:
        _show_failure(job, report, code, seconds, file)


def _show_success(job: FineTuneJob, report: TrainerReport | None, seconds: float, file: str) -> None:
    from rich.table import Table
    from rich.text import Text

    metrics = report.metrics if report else {}
    candidate = report.candidate if report else None
    adapter = (report.adapter or candidate) if report else None
    target = adapter.uri if adapter else job.spec.output.uri
    rows = [("Candidate" if candidate else "Adapter", local_path(target))]
    if adapter:
        rows.append(("", f"rank {adapter.rank}, {formatting.size(adapter.size_bytes)}, verified"))
    checks = report.gate if report else []
    rows += [("Gate", f"{'passed' if each.passed else 'not passed'}: {each.told}") for each in checks]
    for artifact in report.artifacts if report else ():
        told = local_path(artifact.uri) if artifact.uri else f"failed: {artifact.message}"
        rows.append((artifact.name.capitalize(), told))
    rows += gains(metrics)
    if report and report.progress.step:
        speed = metrics.get("tokensPerSecond")
        rows.append(
            ("Training", f"{report.progress.step} steps" + (f", {formatting.number(speed)} tokens/s" if speed else ""))
        )
    rows.append(("Time", formatting.duration(seconds)))

    table = Table.grid(padding=(0, 2))
    for title, value in rows:
        table.add_row(Text(f"  {title}", style="bold"), Text(value))
    console.out().print()
    ending = ", but not published: its gate is not passed" if candidate else ""
    console.done(f"{job.metadata.name} is trained{ending}")
    console.page(table)
    _show_next(job, target, file, is_candidate=candidate is not None)


def _show_next(job: FineTuneJob, target: str, file: str, *, is_candidate: bool) -> None:
    from rich.text import Text

    scheme = uri.parse(target).scheme
    folder = local_path(target) if scheme == "file" else "./adapter"
    console.out().print(Text("\nUse it in Python:", style="bold"))
    for line in load_lines(job, folder):
        console.out().print(Text(f"  {line}", style="cyan"), soft_wrap=True)
    commands = [f"finetune chat {local_path(target)}"] if scheme in ("s3", "file") else []
    commands += [f"finetune download {target} {folder}"] if scheme == "s3" else []
    if is_candidate:
        commands += [f"finetune promote {local_path(target)}"]
    elif file != STDIN:
        # The cluster cannot see this machine's files.
        local = "   # with hf://, s3:// or pvc:// for file://" if "file://" in str(job.spec.manifest()) else ""
        commands += [f"finetune submit {file}{local}"]
    if commands:
        console.next_commands(*commands)


def _show_failure(job: FineTuneJob, report: TrainerReport | None, code: int, seconds: float, file: str) -> None:
    outcome = exit_codes.outcome_of(code, report.reason if report else None)
    reason = outcome.reason if outcome else report.reason if report and report.reason else "failed"
    said = report.message if report and report.message else outcome.cause if outcome else ""
    console.err().print()
    console.print_error(
        f"{job.metadata.name}: {reason} after {formatting.duration(seconds)} (exit code {code})"
        + (f": {said}" if said else "")
    )
    if outcome:
        console.note(f"hint:  {outcome.cure_here or outcome.cure}")
    if reason in _LOOKS and file != STDIN:
        console.next_commands(f"finetune {_LOOKS[reason]} {file}")
