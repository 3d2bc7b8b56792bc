"""A sweep on this machine: its trials one after the other, each in a trainer of its own, or all in one."""

from __future__ import annotations

import os
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api import constants, exit_codes
from finetune_api.exit_codes import OUTPERFORMED
from finetune_api.sweep_packing import DRAWN_LATER, trial_log, why_not_packed
from finetune_api.sweep_tpe import Past
from finetune_cli import drawn_trials, local_run
from finetune_cli.comparison import record
from finetune_cli.errors import CliError, Exit
from finetune_cli.local_trials import Progress, Trial, run_of, summary
from finetune_cli.manifests import refused
from finetune_cli.output import console, run_summary
from finetune_cli.published import published_at
from finetune_cli.storage import cache_folder

if TYPE_CHECKING:
    from finetune_api.manifest import Document
    from finetune_api.spec import FineTuneJob
    from finetune_api.spec_pack import Halving
    from finetune_api.status import TrainerReport
    from finetune_api.sweep import FineTuneSweep

_DIVERGED = exit_codes.OUTCOMES[exit_codes.ExitCode.DIVERGED].reason
#: More than a trainer says of itself.
_MAX_REPORT = 1 << 20
_ALONE = "leave --packed out"
#: Asks the trainer of this machine; a proxy for other machines is not for it.
_LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def run_sweep(document: Document, base: Path, overrides: Sequence[str], *, quiet: bool, packed: bool) -> None:
    """Run the trials of a sweep and print how they compare. Raises CliError where none succeeds, or when stopped.

    Args:
        document: The sweep.
        base: The folder that file://./ starts from.
        overrides: path=value, below spec.
        quiet: Whether to print no summary.
        packed: Whether all trials train in one process.
    """
    from finetune_api import manifest

    try:
        sweep = manifest.check_sweep(document, base, overrides)
    except manifest.ManifestError as error:
        raise refused(error) from None
    drawn_later = sweep.spec.strategy == "tpe"
    if drawn_later:
        drawn_trials.require_optuna()
    trainer = local_run.trainer_command()
    trials = _trials(sweep)
    for trial in trials:
        local_run.check_local(trial.job, os.environ)
    if packed and drawn_later:
        raise CliError(f"the trials of {sweep.metadata.name} cannot share a process: {DRAWN_LATER}", hint=_ALONE)
    if packed and (why := why_not_packed([(trial.name, trial.job.spec) for trial in trials])):
        raise CliError(f"the trials of {sweep.metadata.name} cannot share a process: {why}", hint=_ALONE)
    with Progress(trials) as progress:
        if packed:
            _run_packed(sweep, trials, trainer, progress)
        for trial in () if packed else trials:
            if drawn_later:
                _draw(sweep, trial, trials)
            code = _run(sweep, trial, trials, trainer, progress)
            progress.ended(trial)
            if code == exit_codes.ExitCode.PREEMPTED or code > 128:
                hint = "run the same command again: what is published is kept, and this trial resumes"
                raise CliError(f"stopped in trial {trial.name}", hint=hint, code=code)
    if not quiet:
        summary(sweep, trials)
    if not any(trial.phase == "Succeeded" for trial in trials):
        raise CliError(f"no trial of {sweep.metadata.name} succeeded", code=Exit.JOB_FAILED)


def _trials(sweep: FineTuneSweep) -> list[Trial]:
    from finetune_api import manifest
    from finetune_api.sweep_trials import expand

    name = sweep.metadata.name
    template = sweep.spec.template.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return [
        Trial(each.name, each.summary, each.values, manifest.check(manifest.trial_document(name, template, each)))
        for each in expand(name, sweep.spec)
    ]


def _draw(sweep: FineTuneSweep, trial: Trial, trials: Sequence[Trial]) -> None:
    """Give a trial the values that follow from those before it. Raises CliError."""
    from finetune_api import manifest

    name, template = sweep.metadata.name, sweep.spec.template.model_dump(mode="json", by_alias=True, exclude_unset=True)
    history = [_past(sweep, each) for each in trials[: trials.index(trial)]]
    found = drawn_trials.draw(sweep, trial.name, history, _folder(sweep))
    trial.values, trial.summary = found.values, found.summary
    trial.job = manifest.check(manifest.trial_document(name, template, found))
    local_run.check_local(trial.job, os.environ)


def _past(sweep: FineTuneSweep, trial: Trial) -> Past:
    """Return what a trial that has ended tells of its values."""
    if trial.phase == "Succeeded":
        return Past(trial.values, "succeeded", run_of(trial).metrics.get(sweep.spec.objective.metric))
    if trial.phase == "Stopped" or trial.reason.startswith(f"{_DIVERGED}:"):
        rungs = sweep.spec.early_stopping.rungs if sweep.spec.early_stopping else []
        return Past(trial.values, "behind", losses=dict(zip(rungs, trial.losses, strict=False)))
    return Past(trial.values, "lost")


def _run(sweep: FineTuneSweep, trial: Trial, trials: Sequence[Trial], trainer: str, progress: Progress) -> int:
    """Run one trial to its end and note how it ended; returns the trainer's exit code."""
    import yaml

    if _is_published(trial.job):
        trial.phase, trial.reason = "Succeeded", "published before"
        return int(Exit.OK)
    halving, fell_behind = sweep.spec.early_stopping, False
    trial.phase, trial.started = "Running", time.monotonic()
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder, _log_of(sweep, trial).open("wb") as log:
        env = local_run.environment(os.environ, Path(folder))
        config = Path(folder) / constants.CONFIG_FILE
        config.write_text(yaml.safe_dump(trial.job.manifest(), sort_keys=False, allow_unicode=True), encoding="utf-8")

        def tick() -> bool:
            nonlocal fell_behind
            trial.report = _asked(env[constants.ENV_LISTEN]) or trial.report
            progress.show()
            fell_behind = halving is not None and _is_behind(trial, trials, halving)
            return fell_behind

        command = [*local_run.launcher(trial.job, trainer), "--config", str(config)]
        code = local_run.supervise(command, env, log, tick)
        last = run_summary.read_report(Path(env[constants.ENV_TERMINATION_LOG]))
        trial.report, code = last or trial.report, local_run.trainers_code(code, last)
    trial.seconds = time.monotonic() - trial.started
    if code == Exit.OK:
        trial.phase = "Succeeded"
    elif fell_behind:
        trial.phase, trial.reason, code = "Stopped", "fell behind", int(Exit.OK)
    else:
        outcome = exit_codes.outcome_of(code, last.reason if last else None)
        said = (last.message if last else "") or f"exit code {code}"
        trial.phase, trial.reason = "Failed", f"{outcome.reason if outcome else 'failed'}: {said}"
        console.note(f"{trial.name} failed: {trial.reason}\n  its log: {_log_of(sweep, trial)}")
    return code


def _run_packed(sweep: FineTuneSweep, trials: Sequence[Trial], trainer: str, progress: Progress) -> None:
    """Run all trials in one process and note how each ended. Raises CliError when stopped."""
    import yaml

    left = [trial for trial in trials if not _is_published(trial.job)]
    for trial in trials:
        if trial not in left:
            trial.phase, trial.reason = "Succeeded", "published before"
            progress.ended(trial)
    if not left:
        return
    manifest, began, path, over = sweep.manifest(), time.monotonic(), _log_file(sweep, "packed"), list[Trial]()
    # As named trials: those that are left alone, but the others too if they are compared with them.
    sent = trials if sweep.spec.early_stopping else left
    named = [{"name": trial.name, "values": trial.values} for trial in sent]
    shared = ("template", "objective", "earlyStopping", "parallelism")
    of_all = {key: manifest["spec"][key] for key in shared if key in manifest["spec"]}
    manifest["spec"] = {**of_all, "trials": named}
    manifest["metadata"].pop(
        "uid", None
    )  # with it a trainer is a pod's, and tells of its trials in its own report alone
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder, path.open("wb") as log:
        env = local_run.environment(os.environ, Path(folder))
        config, last = Path(folder) / constants.CONFIG_FILE, Path(env[constants.ENV_TERMINATION_LOG])
        config.write_text(yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True), encoding="utf-8")

        def tick() -> bool:
            for trial in left:
                report = _asked(f"{env[constants.ENV_LISTEN]}/trials/{trial.name}")
                if report and trial not in over:
                    trial.report, trial.phase = report, "Running"
                    trial.started = trial.started or time.monotonic()
                    if report.stage in ("Succeeded", "Failed"):
                        over.append(trial)
                        trial.seconds = time.monotonic() - began
                        trial.phase, trial.reason = _end(report)
                        progress.ended(trial)
            progress.show()
            return False

        code = local_run.supervise([trainer, "--config", str(config)], env, log, tick)
        whole = run_summary.read_report(last)
        for trial in left:
            trial.report = run_summary.read_report(trial_log(last, trial.name))
    for trial in left:
        if trial.report:
            trial.phase, trial.reason = _end(trial.report)
        else:  # its process has told of all of them at most
            trial.phase, trial.reason = "Failed", f"{whole.reason}: {whole.message}" if whole else f"exit code {code}"
        if trial not in over:
            trial.seconds = time.monotonic() - began
            progress.ended(trial)
    if code == exit_codes.ExitCode.PREEMPTED or code > 128:
        hint = "run the same command again: what is published is kept, and the others resume"
        raise CliError("stopped before all trials were published", hint=hint, code=code)
    for trial in left:
        if trial.phase == "Failed":
            console.note(f"{trial.name} failed: {trial.reason}\n  the log: {path}")


def _end(report: TrainerReport) -> tuple[str, str]:
    """Return the phase of a trial of several that has ended, and why."""
    if report.adapter:
        return "Succeeded", ""
    if report.reason == OUTPERFORMED:
        return "Stopped", report.message
    return "Failed", f"{report.reason}: {report.message}"


def _is_behind(trial: Trial, trials: Sequence[Trial], halving: Halving) -> bool:
    """Note the held-out loss at the rungs that `trial` has passed; return whether it falls behind at one of them."""
    progress = trial.report.progress if trial.report else None
    if progress is None or progress.eval_loss is None:
        return False
    for rung in halving.rungs[len(trial.losses) :]:
        if progress.step <= rung:
            return False
        trial.losses.append(progress.eval_loss)
        at = len(trial.losses) - 1
        if halving.is_behind(trial.losses[at], [each.losses[at] for each in trials if len(each.losses) > at]):
            return True
    return False


def _is_published(job: FineTuneJob) -> bool:
    """Return whether the adapter of this very job lies at its output already, and may stay there."""
    from finetune_api.manifest import Document, ManifestError, check

    if job.spec.output.overwrite:
        return False
    try:
        found = check(Document(record.job_of(published_at(job.spec.output.uri, adapters_only=True)), ""))
    except (CliError, ManifestError):
        return False  # the trainer says what is wrong with the output
    # The published job has the format that its rows were read in.
    theirs, ours = (each.spec.manifest() | {"dataset": None} for each in (found, job))
    data = [each.spec.dataset.model_copy(update={"format": "auto"}).manifest() for each in (found, job)]
    return found.metadata.name == job.metadata.name and theirs == ours and data[0] == data[1]


def _log_of(sweep: FineTuneSweep, trial: Trial) -> Path:
    return _log_file(sweep, trial.name)


def _log_file(sweep: FineTuneSweep, name: str) -> Path:
    return _folder(sweep) / f"{name}.log"


def _folder(sweep: FineTuneSweep) -> Path:
    folder: Path = cache_folder(os.environ) / "sweeps" / sweep.metadata.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"{folder}: cannot be made: {error.strerror}", hint="set XDG_CACHE_HOME") from None
    return folder


def _asked(address: str) -> TrainerReport | None:
    """Return what the trainer at `address` says of itself; None while it does not answer."""
    from finetune_api.status import TrainerReport

    try:
        with _LOCAL.open(f"http://{address}/progress", timeout=2) as answer:
            return TrainerReport.model_validate_json(answer.read(_MAX_REPORT))
    except (OSError, ValueError):
        return None
