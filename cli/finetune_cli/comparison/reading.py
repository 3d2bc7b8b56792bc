"""From what the user names to the runs: jobs and sweeps of a cluster, adapters in stores and folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from finetune_api import constants
from finetune_api.packed_jobs import trial_uri
from finetune_api.plain_text import one_line
from finetune_api.trial_report import TrialReport, readable
from finetune_cli.comparison import record, runs
from finetune_cli.comparison.runs import AnsweredRow, Curves, Run
from finetune_cli.errors import CliError, Exit
from finetune_cli.output import console
from finetune_cli.published import Published, address_of, published_at

if TYPE_CHECKING:
    from finetune_cli.kube.client import Cluster
    from finetune_cli.output.job_view import View

T = TypeVar("T")
#: Lines of a running trainer's log in which its losses are looked for.
TAIL_LINES = 3000
#: Stores that are read at the same time.
PARALLEL = 8
#: Runs whose answers are read: they are shown side by side.
ANSWERED = 2


@dataclass(frozen=True)
class _Read:
    """A run, and where it was published if its answers may be read."""

    run: Run
    published: Published | None = None


@dataclass(frozen=True)
class Sweep:
    """What of a sweep decides the order of its trials."""

    name: str
    metric: str
    minimizes: bool


def read_all(sources: Sequence[str], cluster: Callable[[], Cluster], *, whole: bool) -> list[Run]:
    """Return the runs of the sources, in their order.

    Args:
        sources: Names of FineTuneJobs, URIs, and paths, which hold a slash.
        cluster: Connects to the cluster, for jobs.
        whole: Whether to read curves and answers, too.

    Raises:
        CliError: One of them cannot be read.
    """
    connected = cluster() if any(not _is_address(source) for source in sources) else None

    def read(source: str) -> _Read:
        if connected is not None and not _is_address(source):
            return _named(connected, source, whole)
        address = address_of(source)
        published = published_at(address, adapters_only=True)
        run = read_published(published, _last_part(address))
        return _with_record(run, published) if whole else _Read(run)

    return _with_names(_with_answers(_at_once(read, sources), is_named=True))


def _named(cluster: Cluster, name: str, whole: bool) -> _Read:
    """Return the run of a FineTuneJob, or of the trial that would be its only one."""
    from finetune_cli.kube.packed import SharedJob

    try:
        return _job(cluster, cluster.get(name), whole, is_named=True)
    except SharedJob as shared:
        trial, pack = shared.trial, (shared.trial.job.get("spec") or {}).get("pack") or {}
        found = _packed(trial.job, trial.trial, sweep_of(trial.sweep, pack.get("objective")).metric, whole)
        return replace(found, run=replace(found.run, name=one_line(name)))


def read_sweep(name: str, cluster: Cluster, *, whole: bool) -> tuple[Sweep, list[Run]]:
    """Return a sweep of the cluster and the runs of its trials, the best first. Raises CliError."""
    found = cluster.get(name, constants.SWEEP_KIND)
    sweep = sweep_of(name, (found.get("spec") or {}).get("objective"))
    trials = _trials(cluster.jobs(selector=f"{constants.LABEL_SWEEP}={name}").items)
    if not trials:
        raise CliError(f"{name} has no trials yet", hint=f"finetune status --sweep {name}{cluster.options}")

    def read(source: tuple[dict[str, Any], str]) -> _Read:
        job, trial = source
        if (job.get("spec") or {}).get("pack"):
            return _packed(job, trial, sweep.metric, whole)
        found = _job(cluster, job, whole, is_named=False)
        return replace(found, run=replace(found.run, name=one_line(trial))) if trial else found

    ranked = sorted(_at_once(read, trials), key=lambda each: _rank(sweep, each.run))
    return sweep, _with_answers(ranked, is_named=False)


def _trials(jobs: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Return the trials of a sweep, each with the job that holds it: its own, or one that it shares."""
    labels = [(job["metadata"].get("labels") or {}).get(constants.LABEL_TRIAL) for job in jobs]
    own = [(job, label if isinstance(label, str) else "") for job, label in zip(jobs, labels, strict=True)]
    packs = [job for job in jobs if (job.get("spec") or {}).get("pack")]
    alone = {label for job, label in own if label and job not in packs}
    rows = [(job, row.name) for job in packs for row in readable((job.get("status") or {}).get("trials"))]
    return [*(each for each in own if each[0] not in packs), *(each for each in rows if each[1] not in alone)]


def _packed(job: dict[str, Any], trial: str, metric: str, whole: bool) -> _Read:
    """Return the run of a trial that shares a FineTuneJob: as it was published, else as its row tells."""
    from finetune_cli.output.job_view import View

    view = View.of(job)
    rows = readable((job.get("status") or {}).get("trials"))
    row = next((each for each in rows if each.name == trial), None) or TrialReport(name=trial)
    uri = trial_uri(str((view.spec.get("output") or {}).get("uri", "")), trial)
    metrics = {} if row.value is None else {metric: row.value}
    run = Run(one_line(trial), uri, row.phase, runs.values_of(_spec_of(view, trial)), metrics, None)
    if row.phase != "Succeeded":
        return _Read(run)
    try:
        published = published_at(uri, adapters_only=True)
        found = read_published(published, trial)
        return _with_record(found, published) if whole else _Read(found)
    except CliError as error:
        console.note(f"{run.name}: no more than its {metric}: {error.message}")
        return _Read(run)


def _spec_of(view: View, trial: str) -> dict[str, Any]:
    """Return the spec of a trial of a pack; the job's where that cannot be read."""
    from finetune_api.manifest import Document, ManifestError, check, trial_specs

    metadata = {"name": view.name}
    kind = {"apiVersion": constants.API_VERSION, "kind": constants.KIND}
    try:
        job = check(Document(kind | {"metadata": metadata, "spec": view.spec}, ""))
        return dict(trial_specs(view.name, job.spec)[trial].manifest())
    except (ManifestError, KeyError):
        return dict(view.spec)


def sweep_of(name: str, objective: Any) -> Sweep:
    """Return the sweep `name`; an objective that cannot be read is the default one."""
    from pydantic import ValidationError

    from finetune_api.spec_pack import Objective

    try:
        wanted = Objective.model_validate(objective or {}, by_alias=True, by_name=False)
    except ValidationError:
        wanted = Objective()
    return Sweep(name, wanted.metric, wanted.minimizes)


def ordered(sweep: Sweep, found: Sequence[Run]) -> list[Run]:
    """Return the runs, the best first, those without a value last."""
    return sorted(found, key=lambda run: _rank(sweep, run))


def _rank(sweep: Sweep, run: Run) -> tuple[bool, float]:
    return sweep.metric not in run.metrics, (1 if sweep.minimizes else -1) * run.metrics.get(sweep.metric, 0.0)


def read_published(published: Published, name: str) -> Run:
    """Return the run that published an adapter, without curves and answers. Raises CliError."""
    return runs.of_published(published, record.job_of(published), one_line(name))


def _job(cluster: Cluster, job: dict[str, Any], whole: bool, *, is_named: bool) -> _Read:
    """Return the run of a FineTuneJob. What its store does not tell, where it is not named itself, is left out."""
    from finetune_cli.output.job_view import View

    view = View.of(job)
    run = runs.of_job(view)
    if not whole:
        return _Read(run)
    if view.status.adapter is None:
        return _Read(replace(run, curves=_running(cluster, view)))
    try:
        published = published_at(run.uri, adapters_only=True)
        if f"sha256:{published.digest}" != view.status.adapter.manifest_digest:
            raise CliError(f"{run.uri} no longer holds what {run.name} published", code=Exit.CORRUPT)
        return _with_record(run, published)
    except CliError as error:
        if is_named:
            raise
        console.note(f"{run.name}: no curves and no answers: {error.message}")
        return _Read(run)


def _with_record(run: Run, published: Published) -> _Read:
    run = replace(run, metrics={**runs.finite(published.manifest.metrics or {}), **run.metrics})
    curves = _unless_damaged(run, partial(record.curves_of, published), is_named=True) or Curves()
    return _Read(replace(run, curves=curves), published)


def _with_answers(found: Sequence[_Read], *, is_named: bool) -> list[Run]:
    """Return the runs, the first few that published any with their answers: those of a thousand would fill memory."""
    result: list[Run] = []
    left = ANSWERED
    for run, published in ((each.run, each.published) for each in found):
        answers: tuple[AnsweredRow, ...] | None = None
        if published and left:
            answers = _unless_damaged(run, partial(record.answers_of, published), is_named=is_named)
        left -= bool(answers)
        result.append(replace(run, answers=answers) if answers else run)
    return result


def _unless_damaged(run: Run, read: Callable[[], T], *, is_named: bool) -> T | None:
    """Return what is read of a run, None, after a note, where that cannot be. Raises CliError if it was changed.

    A run that the user did not name, one of many trials, is shown without what was changed.
    """
    try:
        return read()
    except CliError as error:
        if error.code == Exit.CORRUPT and is_named:
            raise
        console.note(f"{run.name}: {error.message}")
        return None


def _running(cluster: Cluster, view: View) -> Curves:
    try:
        pods = cluster.pods(view.name) if view.status.progress and view.status.progress.step else []
        return record.curves_in(cluster.log(pods[0]["metadata"]["name"], tail=TAIL_LINES)) if pods else Curves()
    except CliError:
        return Curves()


def _at_once(read: Callable[[Any], _Read], sources: Sequence[Any]) -> list[_Read]:
    with ThreadPoolExecutor(PARALLEL) as pool:
        pending = [pool.submit(read, source) for source in sources]
        try:
            return [each.result() for each in pending]
        except BaseException:
            for each in pending:
                each.cancel()
            raise


def _is_address(source: str) -> bool:
    return "/" in source


def _last_part(address: str) -> str:
    return address.rstrip("/").rpartition("/")[2] or address


def _with_names(found: list[Run]) -> list[Run]:
    """Return the runs with names that tell them apart: where two end alike, their addresses."""
    names = [run.name for run in found]
    return [run if names.count(run.name) == 1 else replace(run, name=one_line(run.uri or run.name)) for run in found]
