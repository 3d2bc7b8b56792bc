"""The Python client: submit a job, wait for it, read its log, fetch its adapter. The models are those of the API.

from finetune_cli.client import FineTune

run = FineTune("research").submit("job.yaml")
status = run.wait(timeout=4 * 3600)
run.download("./adapter")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finetune_api import constants, log_lines, manifest, uri
from finetune_api.packed_jobs import trial_uri
from finetune_api.spec import FineTuneJob, FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_cli import published, storage
from finetune_cli.errors import CliError, Exit
from finetune_cli.kube.connect import connect
from finetune_cli.output.job_view import View

if TYPE_CHECKING:
    from finetune_cli.kube.client import Cluster

__all__ = ["FineTune", "FineTuneError", "JobFailed", "Run"]

#: Of a log in a store, no more than this is read.
MAX_LOG_BYTES = 64 << 20
LOG_FILE = f"{constants.TRAINING_DIR}/log.txt"
#: What every method raises: `message` says what went wrong, `hint` what to do about it.
FineTuneError = CliError


class JobFailed(CliError):
    """The job that was waited for has failed; `status` tells why, attempt by attempt."""

    def __init__(self, view: View) -> None:
        super().__init__(f"{view.name} failed: {view.why}", hint=view.cure, code=Exit.JOB_FAILED)
        self.status = view.status


class FineTune:
    """The FineTuneJobs of one namespace."""

    def __init__(
        self, namespace: str | None = None, *, context: str | None = None, kubeconfig: str | Path | None = None
    ) -> None:
        """Connect as kubectl would: $KUBECONFIG, ~/.kube/config, or a pod's service account.

        Args:
            namespace: Of the jobs; the context's if not given.
            context: Of the kubeconfig.
            kubeconfig: The file.
        """
        self._cluster = connect(namespace, context, Path(kubeconfig) if kubeconfig else None)

    @property
    def namespace(self) -> str:
        """Of the jobs."""
        return self._cluster.namespace

    def submit(
        self,
        job: FineTuneJob | FineTuneJobSpec | Mapping[str, Any] | str | Path,
        *,
        name: str | None = None,
        dry_run: bool = False,
    ) -> Run:
        """Create a job, or change one (server-side apply).

        Args:
            job: A FineTuneJob, its spec (with `name`), a manifest as a mapping, or the path of a file.
            name: Submit under this name.
            dry_run: Let the cluster check it, and change nothing.

        Raises:
            ManifestError: The job is wrong; `problems` says where.
            FineTuneError: The cluster refuses it, or another job writes to the same output.
        """
        document = _document(job)
        if name and isinstance(metadata := document.data.setdefault("metadata", {}), dict):
            metadata["name"] = name
        checked = manifest.check(document)
        refuse_shared_output(self._cluster, checked)
        result, _ = self._cluster.apply(
            {key: value for key, value in document.data.items() if key != "status"}, dry_run=dry_run
        )
        return Run(self._cluster, result["metadata"]["name"])

    def get(self, name: str) -> Run:
        """Return a job by name. Raises FineTuneError if there is none."""
        self._cluster.get(name)
        return Run(self._cluster, name)

    def list(self, selector: str | None = None) -> list[Run]:
        """Return the jobs, or those with these labels ("team=nli,stage!=test")."""
        found = self._cluster.jobs(selector=selector).items
        return [Run(self._cluster, item["metadata"]["name"]) for item in found]


class Run:
    """A FineTuneJob in the cluster."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster = cluster
        self.name = name

    def __repr__(self) -> str:
        return f"Run({self._cluster.namespace}/{self.name})"

    @property
    def status(self) -> FineTuneJobStatus:
        """What the operator says of it now."""
        return View.of(self._cluster.get(self.name)).status

    def wait(
        self, timeout: float | None = None, on_change: Callable[[FineTuneJobStatus], object] | None = None
    ) -> FineTuneJobStatus:
        """Return the status once the job has succeeded.

        Args:
            timeout: Seconds to wait at most.
            on_change: Called with each new status, also the last one.

        Raises:
            JobFailed: It failed.
            TimeoutError: It has not ended in time, and goes on.
            FineTuneError: It was deleted, or the cluster is out of reach.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for job in self._cluster.follow(self.name, deadline):
            if job is None:
                raise CliError(f"{self.name} was deleted while it was waited for")
            view = View.of(job)
            if on_change:
                on_change(view.status)
            if view.state == "failed":
                raise JobFailed(view)
            if view.is_over:
                return view.status
        raise TimeoutError(f"{self.name} has not ended within {timeout:g} s")

    def logs(self, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
        """Yield the lines of the newest attempt's log: from its pod, else from the published adapter.

        Args:
            follow: Go on as lines are written, until the attempt ends.
            tail: Only so many last lines of a pod's log.
        """
        for pod in self._cluster.pods(self.name)[:1]:
            for line in self._cluster.log(pod["metadata"]["name"], follow=follow, tail=tail):
                entry = log_lines.of_json(line)
                yield line if entry is None else log_lines.readable(entry, details=False)
            return
        adapter = self.status.adapter
        if adapter is None:
            raise CliError(f"{self.name} has no pod and no adapter yet, and so no log")
        with storage.store_errors():
            yield from storage.read_lines(storage.open_store(adapter.uri), LOG_FILE, MAX_LOG_BYTES)

    def download(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Fetch the adapter into `folder`, every file's SHA-256 checked; return the folder.

        Args:
            folder: Made if it is not there. What an interrupted download left is used.
            overwrite: Replace another adapter in it.

        Raises:
            FineTuneError: There is no adapter, it is not what the job published, or it is out of reach.
        """
        told = published.of_job(self._cluster, self.name)
        found = published.published_at(told.uri)
        if told.differs_from(found):
            raise CliError(f"{told.uri} no longer holds what {self.name} published", code=Exit.CORRUPT)
        published.fetch_into(Path(folder), found, overwrite=overwrite)
        return Path(folder)

    def suspend(self) -> None:
        """Stop it after a checkpoint, and free its GPUs."""
        self._cluster.patch(self.name, {"spec": {"suspend": True}})

    def resume(self) -> None:
        """Let it go on from its checkpoint."""
        self._cluster.patch(self.name, {"spec": {"suspend": False}})

    def delete(self) -> None:
        """Delete the job and its pods, never what it published."""
        self._cluster.delete(self.name)


def _document(job: FineTuneJob | FineTuneJobSpec | Mapping[str, Any] | str | Path) -> manifest.Document:
    """Return a job as a manifest that says no more than the user did."""
    if isinstance(job, str | Path):
        try:
            text, source = Path(job).read_text(encoding="utf-8"), str(job)
        except OSError as error:
            raise CliError(f"{job}: cannot be read: {error.strerror}") from None
    else:
        data: Any = job if isinstance(job, Mapping) else job.model_dump(mode="json", by_alias=True, exclude_unset=True)
        if isinstance(job, FineTuneJobSpec):
            data = {"apiVersion": constants.API_VERSION, "kind": constants.KIND, "spec": data}
        text, source = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True), "job"
    return manifest.the_document(text, source)


def refuse_shared_output(cluster: Cluster, job: FineTuneJob) -> None:
    """Refuse a job whose output another one that is not over writes: the later would replace or refuse the earlier."""
    try:
        found = cluster.jobs().items
    except CliError as error:
        if not error.is_denied:
            raise
        return  # a user who may not list jobs; the operator looks, too
    name, place = job.metadata.name, uri.place(job.spec.output.uri)
    for view in map(View.of, found):
        output = view.spec.get("output")
        theirs = manifest.with_name(output.get("uri") if isinstance(output, dict) else None, view.name)
        if view.name != name and not view.is_over and isinstance(theirs, str) and place in _places(view, theirs):
            raise CliError(
                f"spec.output.uri: {job.spec.output.uri} is where job {view.name} ({view.phase}) writes",
                hint="give each job its own, for example --set 'output.uri=s3://bucket/{name}', or delete that job",
            )


def _places(view: View, output: str) -> list[str]:
    """Return where a job publishes: each trial of several in a folder of its own."""
    pack = view.spec.get("pack")
    trials = pack.get("trials") if isinstance(pack, dict) else None
    names = [str(each["name"]) for each in trials or () if isinstance(each, dict) and "name" in each]
    return [uri.place(each) for each in ([trial_uri(output, name) for name in names] or [output])]
