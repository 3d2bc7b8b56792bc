"""The shell around the plan, before a simulated API server that answers as it is told to."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from finetune_api import constants
from finetune_operator.core import policy
from finetune_operator.core.builders import job as builder
from finetune_operator.core.objects import kinds
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.status.events import Event
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.errors import ApiError, CreateDenied
from finetune_operator.kube.requests import encoded
from finetune_operator.observability.job_metrics import JobMetrics
from finetune_operator.observability.metrics import Metrics
from finetune_operator.reconcile.event_recorder import EventRecorder
from finetune_operator.reconcile.reconciler import Conflict, Reconciler
from finetune_operator.reconcile.work_queue import Backoff, Result, WorkQueue
from finetune_operator.settings import Settings
from finetune_operator.watch.cache import Cache
from finetune_operator.watch.progress import ProgressPoller
from support.common.largest import largest_job

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
KEY = ObjectKey(constants.KIND, "team", "nli")
SPEC = {
    "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
    "dataset": {"train": "s3://data/train.jsonl"},
    "output": {"uri": "s3://adapters/nli"},
}
Answer = Callable[[str, str, Raw], tuple[int, Raw]]


def job(uid: str = "j1", version: int = 5, **spec: Any) -> Raw:
    metadata = {"name": "nli", "namespace": "team", "uid": uid, "resourceVersion": str(version), "generation": 1}
    return {"metadata": metadata | {"creationTimestamp": "2026-11-01T12:00:00Z"}, "spec": SPEC | spec}


def child(owner: str = "j1", kind: str = constants.KIND, uid: str = "c1") -> Raw:
    controller = {"uid": owner, "controller": True, "kind": kind, "name": "nli"}
    labels = {constants.LABEL_JOB: "nli", constants.LABEL_ATTEMPT: "1"}
    metadata = {"name": "nli-1", "namespace": "team", "uid": uid, "resourceVersion": "6", "labels": labels}
    return {"metadata": metadata | {"ownerReferences": [controller]}, "spec": {}}


def status(code: int, reason: str = "", message: str = "") -> tuple[int, Raw]:
    return code, {"kind": "Status", "code": code, "reason": reason, "message": message}


class Api:
    """Every request is answered by `answer(method, last part of the path, body)`, and noted."""

    def __init__(self) -> None:
        self.answer: Answer = self.well
        self.calls: list[str] = []
        self.written: Raw = {}
        self.pods: list[Raw] = []
        """What lists of pods show; they are not noted."""
        self.metrics = Metrics()
        self.cache = Cache()

    @staticmethod
    def well(method: str, name: str, body: Raw) -> tuple[int, Raw]:
        if method == "POST":
            return 201, {"metadata": {**body["metadata"], "uid": "made", "resourceVersion": "7"}}
        return (200, job(version=8) | {"status": body["status"]}) if method == "PATCH" else status(404, "NotFound")

    async def _handle(self, request: web.Request) -> web.Response:
        name = request.path.rpartition("/")[2]
        if request.method == "GET" and name == "pods":
            found = self.pods if "labelSelector" in request.query else []
            return web.json_response({"metadata": {"resourceVersion": "1"}, "items": found})
        self.calls.append(f"{request.method} {name}")
        if request.method in ("POST", "PATCH", "PUT"):
            assert request.query["fieldValidation"] == "Strict", "what we misspell must not be dropped in silence"
        code, body = self.answer(request.method, name, await request.json() if request.can_read_body else {})
        return web.json_response(body, status=code)

    def run(self, act: Callable[[KubeClient, Reconciler, EventRecorder], Coroutine[Any, Any, None]]) -> None:
        async def serve() -> None:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", self._handle)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            async with aiohttp.ClientSession() as session:
                cluster = KubeClient(session, f"http://127.0.0.1:{runner.addresses[0][1]}", 5)
                recorder = EventRecorder(cluster, self.metrics)
                job_metrics = JobMetrics(lambda: self.cache.owners(JobObject), 10, lambda: NOW, self.metrics.registry)
                poller = ProgressPoller(1, 1, 1, lambda key: None)
                on_status, settings = job_metrics.record_status, Settings()
                denied = self.metrics.status_denied.inc
                reconcile = Reconciler(cluster, self.cache, poller, recorder, on_status, settings, lambda: NOW, denied)
                await act(cluster, reconcile, recorder)
            await runner.cleanup()

        asyncio.run(serve())


@pytest.fixture
def api() -> Api:
    api = Api()
    api.cache.put(constants.KIND, job())
    return api


def test_simulated_api_a_new_job_costs_two_writes_before_its_events(api: Api):
    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        await reconcile(KEY)
        assert api.calls == ["POST jobs", "PATCH status"]
        await reconcile(KEY)
        assert len(api.calls) == 2, "the second time there is nothing to do"

    api.run(act)


def test_simulated_api_after_an_answer_that_was_lost_the_job_is_read_again_before_anything_is_made(api: Api):
    """The status was written, the user deleted all of it, and the watches tell of the children's end first."""

    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        with pytest.raises(ApiError):
            await reconcile(KEY)
        api.cache.tombstone("Job", "made")
        assert await reconcile(KEY) == Result()
        assert api.calls == ["POST jobs", "PATCH status", "GET nli"]

    api.answer = lambda method, name, body: status(500) if method == "PATCH" else api.well(method, name, body)
    api.run(act)


def test_simulated_api_a_job_that_exists_already_and_was_made_from_another_spec_is_not_recorded_as_this_one(api: Api):
    """The answer to its creation was lost, and the user changed the spec before the watch of Jobs showed it."""

    def answer(method: str, name: str, body: Raw) -> tuple[int, Raw]:
        if method == "POST":
            return status(409, "AlreadyExists")
        earlier = child()
        earlier["metadata"]["annotations"] = {constants.ANNOTATION_REVISION: "earlier"}
        return (200, earlier) if method == "GET" else api.well(method, name, body)

    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        with pytest.raises(Conflict, match="exists already and runs something else"):
            await reconcile(KEY)
        assert api.calls == ["POST jobs", "GET nli-1"], "no status"
        await reconcile(KEY)
        assert api.calls[2:] == ["PATCH status", "DELETE nli-1"], "now it is known, and stopped"

    api.answer = answer
    api.run(act)


def test_simulated_api_conflicts_without_end_are_tried_with_growing_pauses(api: Api):
    """Each look shows the same version: a webhook or a proxy gone wrong."""

    def answer(method: str, name: str, body: Raw) -> tuple[int, Raw]:
        return (200, job()) if method == "GET" else status(409, "Conflict") if method == "PATCH" else api.well(
            method, name, body
        )  # fmt: skip

    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        errors: list[Exception | None] = []
        queue = WorkQueue(reconcile, 4, Backoff(0.05, 30), lambda key, seconds, error: errors.append(error))
        work = asyncio.create_task(queue.run())
        queue.add(KEY)
        await asyncio.sleep(1)
        work.cancel()
        assert 2 <= len(errors) <= 8, "40,000 turns a second is what an immediate retry makes"
        assert {type(error) for error in errors} == {Conflict}

    api.answer = answer
    api.run(act)


def test_simulated_api_of_a_large_job_little_is_kept_and_the_rest_is_read_when_it_is_planned(api: Api):
    large = largest_job("nli")["spec"] | {"image": None}
    api.cache = Cache()
    api.cache.put(constants.KIND, job(**large))
    kept = api.cache.owner(KEY)
    assert isinstance(kept, JobObject)
    assert len(kept.spec + kept.status) < 10

    def answer(method: str, name: str, body: Raw) -> tuple[int, Raw]:
        if method == "PATCH":
            api.written = job(version=8, **large) | {"status": body["status"]}
            return 200, api.written
        return (200, api.written) if method == "GET" else api.well(method, name, body)

    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        api.written = job(**large)
        await reconcile(KEY)
        assert api.calls == ["GET nli", "GET nli", "POST jobs", "PATCH status"], "once more with the pods"
        await reconcile(KEY)
        assert api.calls[4:] == ["GET nli"], "there is nothing to do"
        api.written["metadata"]["uid"] = "another"
        with pytest.raises(Conflict):
            await reconcile(KEY)

    api.answer = answer
    api.run(act)


@pytest.mark.parametrize("code", [400, 422])
def test_simulated_api_a_status_that_the_object_cannot_take_is_counted_and_not_tried_for_ever(code: int, api: Api):
    """Stored before a rule of the schema, which every write now breaks."""

    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        assert await reconcile(KEY) == Result()
        assert await reconcile(KEY) == Result(), "as at the next full list"
        assert api.calls.count("PATCH status") == 2
        assert api.calls.count("POST jobs") == 1
        assert api.metrics.registry.get_sample_value("finetune_operator_status_writes_denied_total") == 2

    refused = status(code, "Invalid", "metadata.name must be at most 50")
    api.answer = lambda method, name, body: refused if method == "PATCH" else api.well(method, name, body)
    api.run(act)


@pytest.mark.parametrize(
    ("labels", "template", "lost"),
    [
        ({}, None, f"label {constants.LABEL_JOB}=nli"),
        ({constants.LABEL_JOB: "another"}, None, f"label {constants.LABEL_JOB}=nli"),
        (None, {}, f"label {constants.LABEL_JOB}=nli"),
        (None, {constants.LABEL_JOB: "nli"}, f"label {constants.LABEL_ATTEMPT}=1"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_simulated_api_an_answer_without_our_labels_is_refused_and_deleted_at_once(
    exists: bool, labels: dict[str, str] | None, template: dict[str, str] | None, lost: str, api: Api
):
    """By a webhook; `exists`: the answer to the creation was lost, and the Job is found by its name."""
    deleted: list[Raw] = []
    stored: list[Raw] = []

    def answer(method: str, name: str, body: Raw) -> tuple[int, Raw]:
        if method == "POST":
            made = json.loads(json.dumps(body))
            made["metadata"] |= {"uid": "made", "resourceVersion": "7"}
            if labels is not None:
                made["metadata"]["labels"] = labels
            if template is not None:
                made["spec"]["template"]["metadata"]["labels"] = template
            stored.append(made)
            return status(409, "AlreadyExists") if exists else (201, made)
        if method == "DELETE":
            deleted.append(body)
            return 200, {}
        return (200, stored[-1]) if method == "GET" else api.well(method, name, body)

    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        assert (await reconcile(KEY)).blocked
        assert [body["propagationPolicy"] for body in deleted] == ["Foreground"]
        assert deleted[0]["preconditions"] == {"uid": "made"}
        owner = api.cache.owner(KEY)
        assert isinstance(owner, JobObject)
        conditions = {entry["type"]: entry for entry in json.loads(owner.status)["conditions"]}
        assert conditions["Scheduled"]["reason"] == "LabelsReplaced"
        assert lost in conditions["Scheduled"]["message"]

    api.answer = answer
    api.run(act)


def test_simulated_api_nothing_is_made_beside_a_pod_that_no_watch_shows(api: Api):
    pod = child("c0")
    pod["metadata"] |= {"name": "nli-1-x7k2p", "labels": {}, "uid": "p1"}
    api.pods = [pod | {"status": {"phase": "Running"}}]

    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        assert (await reconcile(KEY)).after == 10
        assert "POST jobs" not in api.calls
        api.pods = []
        await reconcile(KEY)
        assert "POST jobs" in api.calls

    api.run(act)


def test_simulated_api_a_namespace_being_terminated_is_left_alone(api: Api):
    message = 'jobs.batch "nli-1" is forbidden: unable to create new content in namespace team because it is being'

    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        assert await reconcile(KEY) == Result(after=60.0)
        assert api.calls == ["POST jobs"], "no status, no event"
        assert recorder.depth == 0

    api.answer = lambda method, name, body: status(403, "Forbidden", f"{message} terminated")
    api.run(act)


def test_simulated_api_what_the_server_says_is_gone_is_forgotten(api: Api):
    """The watch has missed the deletion of the Job of a job that is over."""
    over = [{"type": "Succeeded", "status": "False", "reason": "x", "lastTransitionTime": "2026-11-01T12:00:00Z"}]
    api.cache.put(
        constants.KIND, job(version=9) | {"status": {"conditions": over, "completionTime": "2026-11-01T12:00:00Z"}}
    )
    api.cache.put("Job", child())

    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        assert await reconcile(KEY) == Result(after=0.0)
        assert await reconcile(KEY) == Result()
        assert api.calls == ["DELETE nli-1"]

    api.answer = lambda method, name, body: status(404, "NotFound")
    api.run(act)


@pytest.mark.parametrize("call", ["delete", "suspend"])
def test_simulated_api_a_conflict_alone_does_not_mean_that_a_job_is_gone(call: str, api: Api):
    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        arguments = ("Job", "team", "nli-1", "c1")
        with pytest.raises(ApiError):
            await getattr(cluster, call)(*arguments)
        api.answer = lambda method, name, body: (200, child(uid="c2")) if method == "GET" else status(409, "Conflict")
        assert not await getattr(cluster, call)(*arguments), "another one has its name by now"

    api.answer = lambda method, name, body: (200, child()) if method == "GET" else status(409, "Conflict")
    api.run(act)


@pytest.mark.parametrize(
    ("kind", "reason", "words"),
    [
        (constants.KIND, "Stopping", "waiting for the earlier job's Job nli-1 to be gone"),
        ("CronJob", "NameConflict", "belongs to CronJob nli: delete or rename it"),
    ],
)
def test_simulated_api_a_name_that_is_taken_is_explained(kind: str, reason: str, words: str, api: Api):
    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        with pytest.raises(CreateDenied) as refused:
            await cluster.ensure({"kind": "Job", **child()}, "j1")
        assert refused.value.reason == reason
        assert words in refused.value.message

    api.answer = lambda method, name, body: (
        (200, child("j0", kind)) if method == "GET" else status(409, "AlreadyExists")
    )
    api.run(act)


def test_simulated_api_a_trial_whose_creation_was_not_answered_keeps_what_was_drawn_for_it(api: Api):
    owner = {"kind": constants.SWEEP_KIND, "name": "nli", "uid": "s1", "controller": True}

    def trial(rate: float, **more: Any) -> Raw:
        notes = {constants.ANNOTATION_VALUES: json.dumps({"training.learningRate": rate})}
        metadata = {
            "namespace": "team",
            "name": "nli-t0",
            "uid": "c1",
            "ownerReferences": [owner],
            "annotations": notes,
        }
        return {"kind": constants.KIND, "metadata": metadata, "spec": {"training": {"learningRate": rate, **more}}}

    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        assert await cluster.ensure(trial(2e-4), "s1") == stored, "drawn again, after another trial ended"

    stored = trial(1e-4, epochs=3)
    api.answer = lambda method, name, body: (200, stored) if method == "GET" else status(409, "AlreadyExists")
    api.run(act)


def of_two_nodes(kind: str) -> Raw:
    """The Service or NetworkPolicy that the operator builds for a job of two nodes."""
    owner = JobObject.from_api(job(resources={"nodes": 2}))
    spec = policy.read_spec(owner)
    assert not isinstance(spec, policy.Rejection)
    built = builder.build(owner, spec, 1, None, Settings(isolated_namespaces=frozenset({"team"})))
    return next(obj for obj in built if obj["kind"] == kind)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("Service", "selector", {"app": "evil"}),
        ("Service", "selector", {constants.LABEL_JOB: "nli", "app": "evil"}),
        ("Service", "selector", None),
        ("Service", "ports", [{"name": "rendezvous", "port": 29500, "targetPort": 22, "protocol": "TCP"}]),
        ("Service", "ports", []),
        ("Service", "clusterIP", "10.0.0.7"),
        ("Service", "publishNotReadyAddresses", False),
        ("NetworkPolicy", "podSelector", {}),
        ("NetworkPolicy", "ingress", [{}]),
        ("NetworkPolicy", "ingress", []),
        ("NetworkPolicy", "policyTypes", ["Egress"]),
    ],
)
def test_simulated_api_a_service_or_policy_of_ours_with_other_content_is_refused(
    kind: str, field: str, value: Any, api: Api
):
    """Whoever may create Services can make one with our name, labels and owner reference."""
    mine = of_two_nodes(kind)
    stored = json.loads(json.dumps(mine))
    stored["metadata"]["uid"] = "s1"
    stored["spec"] |= {"ipFamilies": ["IPv4"], "sessionAffinity": "None"}  # as the API server adds

    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        stored["metadata"]["labels"] = {}
        assert await cluster.ensure(mine, "j1") == stored, "nothing finds it by its labels"
        stored["spec"][field] = value
        with pytest.raises(CreateDenied) as refused:
            await cluster.ensure(mine, "j1")
        assert refused.value.reason == "NameConflict"
        said = f"{kind} nli-nodes exists already, and its spec.{field} is not what this operator sets"
        assert refused.value.message.startswith(said)
        assert not any(call.startswith("DELETE") for call in api.calls), "the operator's account may not delete it"

    api.answer = lambda method, name, body: (200, stored) if method == "GET" else status(409, "AlreadyExists")
    api.run(act)


def test_numbers_that_json_has_not_never_reach_the_api_server():
    body = {"loss": float("nan"), "deep": [{"inf": float("inf"), "step": 3}]}
    assert json.loads(encoded(body)) == {"loss": None, "deep": [{"inf": None, "step": 3}]}


def test_simulated_api_events_wait_while_jobs_do_but_not_for_ever(api: Api):
    async def act(cluster: KubeClient, reconcile: Reconciler, recorder: EventRecorder) -> None:
        busy = True
        recorder = EventRecorder(cluster, api.metrics, lambda: busy, yield_seconds=0.5)
        work = asyncio.create_task(recorder.run())
        about = JobObject.from_api(job())
        recorder.post(kinds.FINETUNE_JOB, about, Event("Normal", "Submitted", "said", "one"), NOW)
        await asyncio.sleep(0.2)
        assert (api.calls, recorder.depth) == ([], 1)
        busy = False
        await recorder.flush(2)
        assert (api.calls, recorder.depth) == (["POST events"], 0)
        busy = True
        recorder.post(
            kinds.FINETUNE_JOB, replace(about, name="other"), Event("Normal", "Submitted", "said", "two"), NOW
        )
        await recorder.flush(5)
        assert len(api.calls) == 2
        work.cancel()

    api.run(act)
