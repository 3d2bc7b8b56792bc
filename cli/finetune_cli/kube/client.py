"""The cluster as the command line sees it: FineTuneJobs and their pods, as plain dicts."""

from __future__ import annotations

import difflib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from finetune_api import answers, constants
from finetune_cli.errors import CliError
from finetune_cli.kube import packed, reading
from finetune_cli.kube.errors import FIELD_MANAGER, NoNamespace, OwnConflict, explained
from finetune_cli.kube.objects import Object, attempt_of, fault_of, index_of, read_job, read_object

#: One watch request lasts this long; the next goes on where it ended.
WATCH_SECONDS = 50
#: The same where something beside the job has to be looked at, too.
POLL_SECONDS = 2
#: A log that is followed may be silent for this long.
SILENCE_SECONDS = 86_400
#: A connection lost while watching may stay lost for this long.
PATIENCE_SECONDS = 60
_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"


@dataclass(frozen=True)
class Cluster:
    """A connection, and the namespace that commands act in."""

    api: Any
    namespace: str
    server: str
    #: Seconds to connect, and to wait for an answer.
    timeout: tuple[float, float] = (5, 30)
    #: What a command is told to act in the same place, for those that hints name.
    options: str = ""

    def __post_init__(self) -> None:
        reading.bound_errors(self.api)

    def get(self, name: str, kind: str = constants.KIND) -> Object:
        """One FineTuneJob, or FineTuneSweep. Raises SharedJob for a trial that shares its job with others."""
        try:
            return self._get(name, kind)
        except CliError as error:
            if not error.is_missing:
                raise
            beside = self._beside(kind)
            if trial := packed.find(name, beside):
                raise packed.SharedJob(trial, self.options) from None
            sweeps = self._beside(constants.SWEEP_KIND) if kind == constants.KIND else []
            if told := packed.of_sweep(name, sweeps, self.options):
                raise told from None
            names = [str(found["metadata"]["name"]) for found in beside]
            if close := next(iter(difflib.get_close_matches(name, names, 1)), ""):
                raise CliError(error.message, hint=f"did you mean {close}?", code=error.code) from None
            raise

    def _beside(self, kind: str) -> list[Object]:
        """Return the objects that are there; none where that cannot be told."""
        try:
            return self._list(kind=kind).items
        except CliError:
            return []

    def before(self, name: str, kind: str = constants.KIND) -> Object | None:
        """Return an object before it is changed; None where there is none, or that cannot be told."""
        try:
            return self._get(name, kind)
        except CliError:
            return None

    def require_namespace(self) -> None:
        """Raise NoNamespace if it is known not to exist. Who may see jobs need not see namespaces."""
        from kubernetes import client

        try:
            with explained(self.server, "", self.namespace, "Namespace"):
                answer = client.CoreV1Api(self.api).read_namespace(
                    self.namespace, _preload_content=False, _request_timeout=self.timeout
                )
                reading.body(answer)
        except CliError as error:
            if isinstance(error, NoNamespace):
                raise

    @contextmanager
    def _asking(self, name: str, kind: str) -> Iterator[None]:
        """Explain what goes wrong with an object: that its whole namespace is missing, rather than that it is."""
        try:
            with explained(self.server, self.namespace, name, kind):
                yield
        except CliError as error:
            if error.is_missing:
                self.require_namespace()
            raise

    def _get(self, name: str, kind: str) -> Object:
        with self._asking(name, kind):
            answer = self._custom().get_namespaced_custom_object(
                *self._place(kind), name, _preload_content=False, _request_timeout=self.timeout
            )
            return read_job(answers.read_object(reading.body(answer))[0])

    def jobs(
        self, *, everywhere: bool = False, selector: str | None = None, kind: str = constants.KIND
    ) -> answers.Listing:
        """FineTuneJobs, or FineTuneSweeps, of the namespace, or of all."""
        listing = self._list(everywhere=everywhere, selector=selector, kind=kind)
        if not (everywhere or listing.items or listing.lost):
            self.require_namespace()
        return listing

    def _list(
        self, *, everywhere: bool = False, selector: str | None = None, kind: str = constants.KIND
    ) -> answers.Listing:
        options: Any = {"_request_timeout": self.timeout, "_preload_content": False}
        options |= {"label_selector": selector} if selector else {}
        group, version, namespace, plural = self._place(kind)
        with explained(self.server, "" if everywhere else namespace, what=kind, selector=selector):
            if everywhere:
                found = self._custom().list_cluster_custom_object(group, version, plural, **options)
            else:
                found = self._custom().list_namespaced_custom_object(group, version, namespace, plural, **options)
            listing = answers.read_list(reading.body(found, reading.MAX_LIST))
            jobs = [item for item in listing.items if not fault_of(item)]
            return answers.Listing(listing.head, jobs, lost=listing.lost + len(listing.items) - len(jobs))

    def apply(self, job: Object, *, dry_run: bool = False, force: bool = False) -> tuple[Object, bool]:
        """Create or change a FineTuneJob or FineTuneSweep by server-side apply; says too whether it is new."""
        try:
            return self._apply(job, dry_run, force)
        except OwnConflict:
            return self._apply(job, dry_run, force=True)

    def _apply(self, job: Object, dry_run: bool, force: bool) -> tuple[Object, bool]:
        name, kind = job["metadata"]["name"], str(job.get("kind", constants.KIND))
        options: Any = {"dry_run": "All"} if dry_run else {}
        with explained(self.server, self.namespace, name, kind):
            # The client's typed path knows 200 alone and drops the body of a 201.
            answer = self._custom().patch_namespaced_custom_object(
                *self._place(kind),
                name,
                job,
                field_manager=FIELD_MANAGER,
                field_validation="Strict",
                force=force,
                _content_type=_APPLY,
                _request_timeout=self.timeout,
                _preload_content=False,
                **options,
            )
            return read_job(json.loads(reading.body(answer))), answer.status == HTTPStatus.CREATED

    def patch(self, name: str, change: Object, kind: str = constants.KIND) -> Object:
        """Merge `change` into a FineTuneJob, or a FineTuneSweep."""
        with self._asking(name, kind):
            answer = self._custom().patch_namespaced_custom_object(
                *self._place(kind),
                name,
                change,
                field_manager=FIELD_MANAGER,
                _content_type=_MERGE,
                _request_timeout=self.timeout,
                _preload_content=False,
            )
            return read_job(answers.read_object(reading.body(answer))[0])

    def delete(self, name: str, kind: str = constants.KIND) -> None:
        """Delete a FineTuneJob, or a FineTuneSweep; what it owns follows in the background."""
        with self._asking(name, kind):
            answer = self._custom().delete_namespaced_custom_object(
                *self._place(kind),
                name,
                propagation_policy="Background",
                _request_timeout=self.timeout,
                _preload_content=False,
            )
            reading.body(answer)

    def follow(
        self,
        name: str,
        deadline: float | None = None,
        *,
        poll: Callable[[Object], bool] = lambda _: False,
        kind: str = constants.KIND,
    ) -> Iterator[Object | None]:
        """Yield the job, or the sweep, now and after every change, None once it is deleted.

        It ends at `deadline` (time.monotonic()). Outlives short losses of connection.

        Args:
            name: Of the object.
            deadline: As time.monotonic() counts.
            poll: Whether to yield it, as it is, every few seconds without a change, too.
            kind: Job or sweep.
        """
        lost_since: float | None = None
        was_there = False
        while deadline is None or time.monotonic() < deadline:
            try:
                job = self._get(name, kind) if was_there else self.get(name, kind)
                lost_since, was_there = None, True
                since = job["metadata"].get("resourceVersion")
                yield job
                if (seconds := _watch_seconds(deadline, poll(job))) <= 0:
                    return
                for event in self._watch(name, str(since or ""), seconds, kind):
                    if event["type"] == "DELETED":
                        yield None
                        return
                    found = event["object"]
                    if event["type"] in ("ADDED", "MODIFIED") and found["metadata"].get("resourceVersion") != since:
                        yield found
            except CliError as error:
                if error.is_missing and was_there:
                    yield None
                    return
                lost_since = lost_since or time.monotonic()
                # A server that has never answered is more likely the wrong one than one that comes back.
                if not (error.may_pass and was_there) or time.monotonic() - lost_since > PATIENCE_SECONDS:
                    raise
                time.sleep(1)

    def _watch(self, name: str, since: str, seconds: int, kind: str) -> Iterator[Object]:
        """Yield the events after version `since`; where the server has forgotten those, the object and what follows.

        It forgets what came before its own start, or before the latest changes of all jobs, however new the object is.
        """
        from kubernetes.client.exceptions import ApiException

        with explained(self.server, self.namespace, name, kind):
            try:
                yield from self._events(name, since, seconds, kind)
            except ApiException as error:
                if error.status != HTTPStatus.GONE:
                    raise
                yield from self._events(name, "", seconds, kind)

    def _events(self, name: str, since: str, seconds: int, kind: str) -> Iterator[Object]:
        answer = self._custom().list_namespaced_custom_object(
            *self._place(kind),
            watch=True,
            field_selector=f"metadata.name={name}",
            resource_version=since,
            timeout_seconds=seconds,
            _preload_content=False,
            _request_timeout=(self.timeout[0], seconds + self.timeout[1]),
        )
        for event in reading.events(answer):
            if event["type"] in ("ADDED", "MODIFIED"):
                read_job(event["object"])
            yield event

    def pods(self, job: str) -> list[Object]:
        """Pods of a job's attempts, the newest attempt first, its rank 0 before the others."""
        from kubernetes import client

        with explained(self.server, self.namespace, what="Pod"):
            answer = client.CoreV1Api(self.api).list_namespaced_pod(
                self.namespace,
                label_selector=f"{constants.LABEL_JOB}={job}",
                _preload_content=False,
                _request_timeout=self.timeout,
            )
            items = [read_object(item) for item in answers.read_list(reading.body(answer, reading.MAX_LIST)).items]
        return sorted(items, key=lambda pod: (-attempt_of(pod), index_of(pod), pod["metadata"]["name"]))

    def deployments(self, selector: str, namespace: str) -> list[Object]:
        """Deployments with these labels, of a namespace or, if it is empty, of all."""
        from kubernetes import client

        apps, options = client.AppsV1Api(self.api), {"_preload_content": False, "_request_timeout": self.timeout}
        with explained(self.server, namespace, what="Deployment"):
            if namespace:
                answer = apps.list_namespaced_deployment(namespace, label_selector=selector, **options)
            else:
                answer = apps.list_deployment_for_all_namespaces(label_selector=selector, **options)
            return [read_object(item) for item in answers.read_list(reading.body(answer, reading.MAX_LIST)).items]

    def log(self, pod: str, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
        """Lines of the trainer's log."""
        from kubernetes import client

        options: Any = {"tail_lines": tail} if tail is not None else {}
        with explained(self.server, self.namespace, pod, what="Pod"):
            answer = client.CoreV1Api(self.api).read_namespaced_pod_log(
                pod,
                self.namespace,
                container=constants.TRAINER_CONTAINER,
                follow=follow,
                _preload_content=False,
                _request_timeout=(self.timeout[0], SILENCE_SECONDS) if follow else self.timeout,
                **options,
            )
            yield from reading.lines(answer)

    def _custom(self) -> Any:
        from kubernetes import client

        return client.CustomObjectsApi(self.api)

    def _place(self, kind: str = constants.KIND) -> tuple[str, str, str, str]:
        plural = constants.SWEEP_PLURAL if kind == constants.SWEEP_KIND else constants.PLURAL
        return constants.GROUP, constants.VERSION, self.namespace, plural


def _watch_seconds(deadline: float | None, poll: bool) -> int:
    """How long the next watch may last; 0 or less once the deadline has passed."""
    longest = POLL_SECONDS if poll else WATCH_SECONDS
    return longest if deadline is None else min(longest, math.ceil(deadline - time.monotonic()))
