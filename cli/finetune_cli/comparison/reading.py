"""From what the user names to the runs: jobs and sweeps of a cluster, adapters in stores and folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune_api import constants
from finetune_api.plain_text import one_line
from finetune_cli.comparison import record, runs
from finetune_cli.comparison.runs import Curves, Run
from finetune_cli.errors import CliError, Exit
from finetune_cli.output import console
from finetune_cli.published import Published, address_of, published_at

if TYPE_CHECKING:
    from finetune_cli.kube.client import Cluster
    from finetune_cli.output.job_view import View

#: Lines of a running trainer's log in which its losses are looked for.
TAIL_LINES = 3000
#: Stores that are read at the same time.
PARALLEL = 8


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

    def read(source: str) -> Run:
        if connected is not None and not _is_address(source):
            return _job(connected, connected.get(source), whole, is_named=True)
        address = address_of(source)
        return read_published(published_at(address, adapters_only=True), _last_part(address), whole=whole)

    return _with_names(_at_once(read, sources))


def read_sweep(name: str, cluster: Cluster, *, whole: bool) -> tuple[Sweep, list[Run]]:
    """Return a sweep of the cluster and the runs of its trials, the best first. Raises CliError."""
    found = cluster.get(name, constants.SWEEP_KIND)
    sweep = sweep_of(name, (found.get("spec") or {}).get("objective"))
    jobs = cluster.jobs(selector=f"{constants.LABEL_SWEEP}={name}").items
    if not jobs:
        raise CliError(f"{name} has no trials yet", hint=f"finetune status --sweep {name}")

    def read(job: dict[str, Any]) -> Run:
        run = _job(cluster, job, whole, is_named=False)
        trial = (job["metadata"].get("labels") or {}).get(constants.LABEL_TRIAL)
        return replace(run, name=one_line(trial)) if isinstance(trial, str) and trial else run

    return sweep, ordered(sweep, _at_once(read, jobs))


def sweep_of(name: str, objective: Any) -> Sweep:
    """Return the sweep `name`; an objective that cannot be read is the default one."""
    from pydantic import ValidationError

    from finetune_api.sweep import Objective

    try:
        wanted = Objective.model_validate(objective or {}, by_alias=True, by_name=False)
    except ValidationError:
        wanted = Objective()
    return Sweep(name, wanted.metric, wanted.minimizes)


def ordered(sweep: Sweep, found: Sequence[Run]) -> list[Run]:
    """Return the runs, the best first, those without a value last."""
    sign = 1 if sweep.minimizes else -1
    return sorted(found, key=lambda run: (sweep.metric not in run.metrics, sign * run.metrics.get(sweep.metric, 0.0)))


def read_published(published: Published, name: str, *, whole: bool) -> Run:
    """Return the run that published an adapter. Raises CliError."""
    run = runs.of_published(published, record.job_of(published), one_line(name))
    return _with_record(run, published) if whole else run


def _job(cluster: Cluster, job: dict[str, Any], whole: bool, *, is_named: bool) -> Run:
    """Return the run of a FineTuneJob. What its store does not tell, where it is not named itself, is left out."""
    from finetune_cli.output.job_view import View

    view = View.of(job)
    run = runs.of_job(view)
    if not whole:
        return run
    if view.status.adapter is None:
        return replace(run, curves=_running(cluster, view))
    try:
        published = published_at(run.uri, adapters_only=True)
        if f"sha256:{published.digest}" != view.status.adapter.manifest_digest:
            raise CliError(f"{run.uri} no longer holds what {run.name} published", code=Exit.CORRUPT)
        return _with_record(run, published)
    except CliError as error:
        if is_named:
            raise
        console.note(f"{run.name}: no curves and no answers: {error.message}")
        return run


def _with_record(run: Run, published: Published) -> Run:
    metrics = {**runs.finite(published.manifest.metrics or {}), **run.metrics}
    try:
        curves = record.curves_of(published)
        return replace(run, metrics=metrics, curves=curves, answers=record.answers_of(published))
    except CliError as error:
        if error.code == Exit.CORRUPT:
            raise
        console.note(f"{run.name}: {error.message}")
        return replace(run, metrics=metrics)


def _running(cluster: Cluster, view: View) -> Curves:
    try:
        pods = cluster.pods(view.name) if view.status.progress and view.status.progress.step else []
        return record.curves_in(cluster.log(pods[0]["metadata"]["name"], tail=TAIL_LINES)) if pods else Curves()
    except CliError:
        return Curves()


def _at_once(read: Callable[[Any], Run], sources: Sequence[Any]) -> list[Run]:
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
